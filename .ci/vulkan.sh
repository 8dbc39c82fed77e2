#!/usr/bin/env bash
# Make sure SAPIEN finds a Vulkan device: the NVIDIA driver where there is one, else Mesa's software renderer (lavapipe).
# Idempotent, asks nothing. Without root and without any driver it prints the command an administrator has to run, and fails.
set -euo pipefail

libraries=(libvulkan1 libegl1 libgl1 libxext6 libx11-6 libglib2.0-0)
mesa=mesa-vulkan-drivers

has_nvidia() { [ -e /dev/nvidiactl ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; }
has_lavapipe() { compgen -G '/usr/share/vulkan/icd.d/lvp_icd*.json' >/dev/null && mesa_is_new_enough; }
# SAPIEN 3.0 needs Vulkan features that Debian 12's own Mesa (22.3) lacks; 24.3 and newer have them.
mesa_is_new_enough() {
  local version
  version=$(dpkg-query -W -f '${Version}' "$mesa" 2>/dev/null) && dpkg --compare-versions "$version" ge 24.3
}
missing_libraries() {
  local package
  for package in "${libraries[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || echo "$package"
  done
}

if ! command -v dpkg-query >/dev/null; then
  echo "vulkan: not a Debian-like system; install a Vulkan driver and loader, then check with 'python -m trl_stare.envs.doctor'"
  exit 0
fi

wanted=$(missing_libraries)
driver=none
if has_nvidia; then driver=nvidia; elif has_lavapipe; then driver=lavapipe; fi
if [ "$driver" != none ] && [ -z "$wanted" ]; then
  echo "vulkan: $driver is there"
  exit 0
fi

if [ "$(id -u)" != 0 ]; then
  echo "vulkan: driver: $driver, missing packages: ${wanted:-none}. Ask an administrator to run, in this folder:" >&2
  echo "    sudo bash $(realpath "${BASH_SOURCE[0]}")" >&2
  # a missing library is for the doctor to judge (it may come from elsewhere); no driver at all cannot work
  if [ "$driver" = none ]; then exit 1; else exit 0; fi
fi

export DEBIAN_FRONTEND=noninteractive
echo "vulkan: installing system packages (about 1 minute)"
apt-get update -qq
options=()
if [ "$driver" = none ]; then
  wanted="$wanted $mesa"
  codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  if [ "$codename" = bookworm ]; then
    if ! apt-cache madison "$mesa" | grep -q bookworm-backports; then
      # the mirror this machine already uses for its main packages
      mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' 'Created-By: Packages' | head -n 1)
      echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm-backports main" \
        >/etc/apt/sources.list.d/trl-stare-backports.list
      apt-get update -qq
    fi
    options=(-t bookworm-backports)
  fi
fi
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends "${options[@]}" $wanted >/dev/null
if [ "$driver" = none ] && ! mesa_is_new_enough; then
  echo "vulkan: \`$mesa\` must be 24.3 or newer, got $(dpkg-query -W -f '${Version}' "$mesa"). Install a newer Mesa by hand." >&2
  exit 1
fi
echo "vulkan: ready"
