#!/usr/bin/env bash
# Runs one command in a small virtual machine that has emulated NVMe drives.
#
#   run.sh --setup                          only fetch and build what is missing; says why where it cannot
#   run.sh --setup-system                   and the system of --system
#   run.sh [option]... -- COMMAND [ARG]...
#
# The machine is emulated in software, so it needs no /dev/kvm: QEMU and a kernel from Debian's backports, an initramfs with
# busybox, nvme-cli and this machine's C library. COMMAND runs there as root; its output comes out here as one stream, and
# its exit code is this script's. 124: ran past the time limit. 125: the guest gave no exit code (it did not boot, panicked,
# or QEMU was killed); the end of its console is then on stderr.
#
#   --bin FILE      a program, with its shared libraries, for the guest's PATH (repeatable)
#   --out DIR       unpack here what the command leaves in the guest's /out
#   --drive SPEC    one NVMe controller with one namespace (repeatable). SPEC is comma-separated:
#                     serial=S   required, [a-z0-9]+; in the guest the namespace is /dev/drives/S, its passthrough device
#                                /dev/drives/S-ng, its controller /dev/drives/S-ctrl (numbers can change from boot to boot)
#                     size=256M  lba=512  file=PATH (an image to keep; else a temporary one)
#                     error=read:SECTOR or error=write:SECTOR   a medium error at that 512-byte sector
#                     log=PATH   every write and flush also goes to PATH, in the format of dm-log-writes
#   --system IMAGE  COMMAND runs in a Debian system with systemd, once that has started everything; then the machine shuts down.
#                   IMAGE is its drive, serial "system": made if it is not there, kept for the next boot. Not with --out
#   --timeout SEC   whole run, boot included (default 120)
#   --pidfile FILE  QEMU's pid, for a test that kills it
#   --console FILE  keep the guest's console here
#
# $NVTIER_CACHE/guest (default ~/.cache/nvtier/guest) holds what was fetched and built.
set -Eeuo pipefail
# What `die` said in a subshell is not said again.
trap 'rc=$?; [ $rc = 125 ] || echo "guest: line $LINENO failed" >&2; exit 125' ERR

readonly SUITE=bookworm
readonly KERNEL=linux-image-cloud-amd64
readonly CACHE=${NVTIER_CACHE:-$HOME/.cache/nvtier}/guest

die() { echo "guest: $*" >&2; exit 125; }

# shellcheck source=tests/guest/system.sh
. "${BASH_SOURCE[0]%/*}/system.sh"

# ---------------------------------------------------------------- setup
# apt with lists of its own: this machine's sources and their backports. /etc/apt and /var/lib/apt stay as they are.
apt_here() {
  local tool=$1; shift
  "$tool" -q -o Dir::Etc::SourceList="$CACHE/apt/backports.list" -o Dir::State::Lists="$CACHE/apt/lists" \
    -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o Acquire::Languages=none \
    -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false -o APT::Sandbox::User=root -o DPkg::Lock::Timeout=120 "$@"
}

apt_ready=
apt_update() {
  [ -z "$apt_ready" ] || return 0
  mkdir -p "$CACHE/apt/lists/partial"
  local uri
  # shellcheck disable=SC2016  # apt's own variables
  uri=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
    awk -v r="$SUITE" '$2 == r { u = $1 } END { print u }')
  [ -n "$uri" ] || die "apt has no source for $SUITE here"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri $SUITE-backports main" > "$CACHE/apt/backports.list"
  apt_here apt-get update -o APT::Update::Error-Mode=any > "$CACHE/apt/log" 2>&1 || die "apt-get update failed: $(tail -n 1 "$CACHE/apt/log")"
  apt_ready=1
}

# --no-remove: the release's own qemu-system would take a newer qemu-utils away.
install_packages() {
  apt_update
  echo "guest: installing $*" >&2
  DEBIAN_FRONTEND=noninteractive apt_here apt-get install -y --no-install-recommends --no-remove "$@" \
    > "$CACHE/apt/log" 2>&1 || die "apt-get install $* failed: $(tail -n 1 "$CACHE/apt/log")"
}

# QEMU 7.2 (bookworm) crashes emulated guests at random; 10.0 (its backports) does not.
setup_programs() {
  local version missing=()
  version=$({ qemu-system-x86_64 --version 2>/dev/null || :; } | sed -n '1s/.*version \([0-9]*\).*/\1/p')
  command -v cpio >/dev/null || missing+=(cpio)
  command -v zstd >/dev/null || missing+=(zstd)
  dpkg-query -W libjson-c5 >/dev/null 2>&1 || missing+=(libjson-c5)
  if [ "${version:-0}" -lt 10 ] || [ ${#missing[@]} -gt 0 ]; then
    [ "$(id -u)" = 0 ] || die "needs qemu-system-x86 10 or newer ${missing[*]}, and only root can install packages"
  fi
  [ "${version:-0}" -ge 10 ] || install_packages -t "$SUITE-backports" qemu-system-x86
  [ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
}

# unpack DIR NAME...: fetches packages and unpacks them, installing nothing
unpack() {
  local into=$1 deb; shift
  mkdir -p "$into"
  apt_here apt-get download "$@" > "$CACHE/apt/log" 2>&1 || die "cannot fetch $*: $(tail -n 1 "$CACHE/apt/log")"
  for deb in ./*.deb; do dpkg -x "$deb" "$into"; rm "$deb"; done
}

# Shared libraries, with the loader, that programs need.
libs_of() {
  { ldd "$@" 2>/dev/null || :; } | awk '
    /=> not found/ { print "guest: no " $1 > "/dev/stderr"; bad = 1 }
    $2 == "=>" && $3 ~ /^\// { print $3 }
    $1 ~ /^\// && $1 !~ /:$/ { print $1 }
    END { exit bad }' | sort -u
}

# The payload of a kernel image, so that the guest need not unpack it itself.
vmlinux_of() {
  local at
  # shellcheck disable=SC2013
  for at in $(LC_ALL=C grep -obUaP '\x28\xb5\x2f\xfd' "$1" | cut -d: -f1); do
    tail -c +$((at + 1)) "$1" | zstd -dc > "$2" 2>/dev/null || :
    [ "$(head -c 4 "$2" | tr -d '\0')" != $'\x7fELF' ] || return 0
  done
  die "no zstd payload in $1"
}

build() {
  local work kernel root lib libs
  work=$(mktemp -d "$CACHE/build.XXXXXX")
  cd "$work"
  apt_update
  kernel=$(apt_here apt-get install -s --no-install-recommends -t "$SUITE-backports" "$KERNEL" 2>/dev/null |
    awk '/^Inst linux-image-[0-9]/ { k = $2 } END { print k }') || die 'apt cannot resolve a kernel of the backports'
  [ -n "$kernel" ] || die "the backports have no kernel"
  echo "guest: fetching $kernel" >&2
  unpack kernel "$kernel"
  unpack tools busybox-static nvme-cli libnvme1
  vmlinux_of kernel/boot/vmlinuz-* vmlinux
  root=$work/root
  mkdir -p "$root"/{bin,dev,etc,proc,sys,tmp,run,mnt,out,usr/local/bin}
  ln -s bin "$root/sbin"
  cp tools/bin/busybox "$root/bin/"
  cp tools/usr/sbin/nvme "$root/usr/local/bin/"
  libs=$(LD_LIBRARY_PATH=$work/tools/usr/lib/x86_64-linux-gnu libs_of tools/usr/sbin/nvme)
  for lib in $libs; do install -D -m 755 "$lib" "$root/${lib#"$work/tools"}"; done
  # Loaded by name.
  for lib in libgcc_s.so.1 libm.so.6; do
    lib=$(ldconfig -p | awk -v l="$lib" '$1 == l && /x86-64/ { f = $NF } END { print f }')
    [ -z "$lib" ] || install -D -m 755 "$lib" "$root$lib"
  done
  init > "$root/init"
  chmod +x "$root/init"
  ( cd "$root" && find . | cpio -o -H newc --quiet ) > base.cpio
  mkdir -p "$CACHE/$STAMP/lib"
  mv kernel/lib/modules "$CACHE/$STAMP/lib/"
  echo "${kernel#linux-image-}" > "$CACHE/$STAMP/version"
  mv vmlinux base.cpio "$CACHE/$STAMP/"
  cd /
  rm -rf "$work"
}

# The guest's first process.
init() {
  cat <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/usr/local/bin:/bin HOME=/tmp TMPDIR=/tmp LD_LIBRARY_PATH=/usr/lib/x86_64-linux-gnu:/lib/x86_64-linux-gnu
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/drives
mount -t tmpfs tmpfs /dev/shm
ln -s /proc/self/fd /dev/fd
ip link set lo up
hostname guest
port() { grep -lx "$1" /sys/class/virtio-ports/*/name | sed 's,/name$,,; s,.*/,/dev/,'; }
. /job/env
n=0
until [ "$(ls -d /sys/class/nvme/nvme*/nvme*n* 2>/dev/null | wc -l)" -ge "$DRIVES" ] || [ $n = 100 ]; do
  sleep 0.1; n=$((n + 1))
done
# Names that stay the same from boot to boot; again whenever the command asks for it.
cat > /bin/name-drives <<'END'
rm -f /dev/drives/*
for c in /sys/class/nvme/nvme*; do
  [ -e "$c/serial" ] || continue
  s=$(tr -d ' ' < "$c/serial")
  for d in "$c"/nvme*n*; do
    d=${d##*/}
    [ -b "/dev/$d" ] || continue
    ln -s "/dev/${c##*/}" "/dev/drives/$s-ctrl"
    ln -s "/dev/$d" "/dev/drives/$s"
    ln -s "/dev/ng${d#nvme}" "/dev/drives/$s-ng"
    break
  done
done
END
sh /bin/name-drives
if [ -n "$SYSTEM" ]; then
INIT
  system_init
  cat <<'INIT'
fi
out=$(port stdout); rc=$(port rc)
cd /tmp
echo begun > "$rc"
sh /job/command < /dev/null > "$out" 2>&1
echo $? > "$rc"
if [ -n "$TAKE_OUT" ]; then tar -C /out -cf - . > "$(port out)"; fi
sync
poweroff -f
INIT
}

setup() {
  [ "$(uname -m)" = x86_64 ] || die "the guest is one of x86-64, this machine is not"
  command -v apt-get dpkg >/dev/null || die "needs apt and dpkg to get QEMU and a kernel"
  mkdir -p "$CACHE/apt"
  # Changed build steps build anew; so does a changed C library of this machine, which programs in the guest use.
  STAMP=$({ declare -f build init system_init; ldd --version | sed -n 1p; } | sha256sum | cut -c1-16)
  exec 9> "$CACHE/lock"
  flock 9
  setup_programs
  [ -e "$CACHE/$STAMP/base.cpio" ] || ( build )
  exec 9>&-
}

# ---------------------------------------------------------------- run
# drive_args N SPEC: sets QEMU's arguments for one drive in the array drive
drive_args() {
  local n=$1 spec=$2 field key value fields
  local serial='' size=256M lba=512 file='' log='' errors=()
  IFS=, read -ra fields <<< "$spec"
  for field in "${fields[@]}"; do
    key=${field%%=*} value=${field#*=}
    case $key in
      serial | size | lba | file | log) printf -v "$key" %s "$value" ;;
      error) errors+=("$value") ;;
      *) die "unknown field in --drive: $key" ;;
    esac
  done
  [[ $serial =~ ^[a-z0-9]+$ ]] || die "--drive needs serial=[a-z0-9]+"
  file=${file:-$TMP/$serial.raw}
  [ -e "$file" ] || truncate -s "$size" "$file"
  local c='cache.direct=on,cache.no-flush=off' node=file$n
  drive=(-blockdev "driver=file,node-name=$node,filename=$file,aio=threads,discard=unmap,$c")
  if [ ${#errors[@]} -gt 0 ]; then
    local rules='' i=0 e
    for e in "${errors[@]}"; do
      rules+=",inject-error.$i.event=none,inject-error.$i.iotype=${e%%:*},inject-error.$i.errno=5,inject-error.$i.sector=${e#*:}"
      i=$((i + 1))
    done
    drive+=(-blockdev "driver=blkdebug,node-name=dbg$n,image=$node,$c$rules")
    node=dbg$n
  fi
  if [ -n "$log" ]; then
    truncate -s 0 "$log"
    drive+=(-blockdev "driver=file,node-name=log$n,filename=$log"
      -blockdev "driver=blklogwrites,node-name=lw$n,file=$node,log=log$n,log-sector-size=$lba,$c")
    node=lw$n
  fi
  drive+=(-blockdev "driver=raw,node-name=drive-$serial,file=$node,$c"
    -device "nvme,id=nvme-$serial,serial=$serial,drive=drive-$serial,logical_block_size=$lba,physical_block_size=$lba")
}

main() {
  local bins=() drives=() out='' limit=120 pidfile='' console='' system='' only_setup=''
  while [ $# -gt 0 ]; do
    case $1 in
      --setup | --setup-system) only_setup=$1; shift ;;
      --system) system=$2; shift 2 ;;
      --bin) bins+=("$2"); shift 2 ;;
      --drive) drives+=("$2"); shift 2 ;;
      --out) out=$2; shift 2 ;;
      --timeout) limit=$2; shift 2 ;;
      --pidfile) pidfile=$2; shift 2 ;;
      --console) console=$2; shift 2 ;;
      --) shift; break ;;
      *) die "unknown option $1" ;;
    esac
  done
  [ -z "$system" ] || [ -z "$out" ] || die '--out and --system do not go together'
  setup
  [ -z "$system" ] && [ "$only_setup" != --setup-system ] || setup_system
  if [ -n "$only_setup" ]; then
    echo "guest: Linux $(cat "$CACHE/$STAMP/version"), $(qemu-system-x86_64 --version | sed -n 1p)"
    exit 0
  fi
  [ $# -gt 0 ] || die 'no command given'

  TMP=$(mktemp -d "${TMPDIR:-/tmp}/nvtier-guest.XXXXXX")
  trap 'rm -rf "$TMP"' EXIT
  console=${console:-$TMP/console}

  mkdir -p "$TMP"/root/{job,usr/local/bin}
  if [ -n "$system" ]; then
    [ -e "$system" ] || cp --sparse=always "$CACHE/$STAMP/$SYSTEM_STAMP.img" "$system"
    drives+=("serial=system,file=$system")
  fi
  printf 'TAKE_OUT="%s"\nDRIVES=%s\nSYSTEM="%s"\n' "$out" "${#drives[@]}" "$system" > "$TMP/root/job/env"
  printf '%q ' "$@" > "$TMP/root/job/command"
  local file
  for file in "${bins[@]}"; do
    install -m 755 "$file" "$TMP/root/usr/local/bin/"
    # Debug information only makes the initramfs larger.
    strip "$TMP/root/usr/local/bin/${file##*/}" 2>/dev/null || :
  done
  if [ ${#bins[@]} -gt 0 ]; then
    libs_of "${bins[@]}" | while read -r file; do install -D -m 755 "$file" "$TMP/root$file"; done
  fi
  ( cd "$TMP/root" && find . | cpio -o -H newc --quiet ) | cat "$CACHE/$STAMP/base.cpio" - > "$TMP/initrd"
  rm -rf "$TMP/root"

  local args=() drive=() i
  for i in "${!drives[@]}"; do drive_args "$i" "${drives[i]}"; args+=("${drive[@]}"); done
  [ -z "$pidfile" ] || args+=(-pidfile "$pidfile")

  # The output has a pipe of its own; as QEMU's own output it would stop at the end of QEMU's input.
  mkfifo "$TMP/stdout"
  cat "$TMP/stdout" &
  local cat=$! rc=0 start=$SECONDS
  exec 8> "$TMP/stdout"
  # Now and then this emulator gives up while the guest's kernel looks for its devices (an assertion about its memory map). As long as
  # the command has not begun, another try is as good.
  local try
  for try in 1 2 3; do
    rc=0
    timeout --foreground -k 5 "$limit" qemu-system-x86_64 \
      -accel tcg,thread=multi -M q35 -cpu max,la57=off -smp 2 -m 1024 -nodefaults -display none -no-reboot \
      -kernel "$CACHE/$STAMP/vmlinux" -initrd "$TMP/initrd" \
      -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=1 nvme_core.multipath=N" \
      -chardev "file,id=con,path=$console" -serial chardev:con \
      -device virtio-serial-pci \
      -chardev "file,id=stdout,path=$TMP/stdout" -device virtserialport,chardev=stdout,name=stdout \
      -chardev "file,id=rc,path=$TMP/rc" -device virtserialport,chardev=rc,name=rc \
      -chardev "file,id=out,path=$TMP/out.tar" -device virtserialport,chardev=out,name=out \
      -device virtio-rng-pci \
      "${args[@]}" < /dev/null > "$TMP/qemu" 2>&1 8>&- || rc=$?
    [ "$rc" = 134 ] && [ ! -s "$TMP/rc" ] || break
    echo "guest: the emulator gave up before the command began, try $try: $(tail -n 1 "$TMP/qemu")" >&2
  done
  exec 8>&-
  wait "$cat"

  local code
  code=$(sed -n '2p' "$TMP/rc" 2>/dev/null || :)
  if [ -z "$code" ]; then
    if [ $((SECONDS - start)) -ge "$limit" ]; then
      echo "guest: ran past $limit s; the end of its console:" >&2
      tail -n 5 "$console" >&2
      exit 124
    fi
    echo "guest: it gave no exit code (QEMU: $rc); the end of its console:" >&2
    tail -n 20 "$console" >&2 || :
    tail -n 5 "$TMP/qemu" >&2
    exit 125
  fi
  [ -z "$out" ] || { mkdir -p "$out"; tar -C "$out" -xf "$TMP/out.tar"; }
  exit "$code"
}

main "$@"
