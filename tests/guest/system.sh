# A Debian system for the guest, with systemd, udev, LVM and XFS, on a drive of its own. run.sh reads this file.
#
# It is made of packages that are fetched and unpacked; none of them is installed, and no script of theirs is run.

readonly SYSTEM_PACKAGES=(systemd udev lvm2 xfsprogs mount util-linux kmod busybox-static)
# What is loaded in it as a module; what these need comes along.
readonly SYSTEM_MODULES=(dm-mod xfs)
# Of what the packages depend on: what nothing here runs, and what busybox has.
readonly SYSTEM_WITHOUT='adduser|coreutils|dbus|debconf|dpkg|gcc|libcom-err|libdb|libexpat|libgssapi|libicu|libk5|libkeyutils|libkrb5|libnsl|libpam-modules|libpython|libsemanage|libsepol|libsqlite|libstdc|libtirpc|lsb|media-types|passwd|perl|python|readline-common|sysvinit|tar|thin-|util-linux-extra'
readonly SYSTEM_RULES='-(udev-default|dm|lvm|block|persistent-storage|persistent-storage-dm|dm-notify|systemd)\.rules$'
readonly SYSTEM_SIZE=320M

# Everything that the packages need, as if nothing were installed here: NAME=VERSION, one a line.
system_packages() {
  : > status
  apt_here apt-get install -s --no-install-recommends -o Dir::State::status="$PWD/status" "${SYSTEM_PACKAGES[@]}" 2> "$CACHE/apt/log" |
    awk -v without="^($SYSTEM_WITHOUT)" '/^Inst/ && $2 !~ without { print $2 "=" substr($3, 2) }'
}

# depmod FOLDER: of the modules below it, by the system's own kmod and C library
depmod_in() {
  local lib=root/usr/lib/x86_64-linux-gnu
  "$lib/ld-linux-x86-64.so.2" --library-path "$lib" --argv0 depmod root/usr/bin/kmod -b "$1" "$(cat "$CACHE/$STAMP/version")"
}

system_modules() {
  local version name line file from to
  version=$(cat "$CACHE/$STAMP/version")
  from=$CACHE/$STAMP/lib/modules/$version to=root/usr/lib/modules/$version
  depmod_in "$CACHE/$STAMP"
  mkdir -p "$to"
  cp "$from"/modules.{builtin,builtin.modinfo,order} "$to/"
  for name in "${SYSTEM_MODULES[@]}"; do
    line=$(grep -E "/$name\.ko[.a-z]*:" "$from/modules.dep") || continue # it is built in
    for file in ${line/:/}; do install -D -m 644 "$from/$file" "$to/$file"; done
  done
  depmod_in root
}

# What the packages' scripts would have written, and the unit that runs the command.
system_files() {
  local unit name
  printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n' > root/etc/passwd
  printf 'root:x:0:\ntty:x:5:\ndisk:x:6:\nkmem:x:15:\ndialout:x:20:\ncdrom:x:24:\ntape:x:26:\nvideo:x:44:\nnogroup:x:65534:\n' > root/etc/group
  for name in audio input kvm lp render sgx systemd-journal; do echo "$name:x:$((100 + ${#name})):" >> root/etc/group; done
  echo guest > root/etc/hostname
  echo 00000000000000000000000000000001 > root/etc/machine-id
  # The journal stays: how things ended is seen after the next boot.
  mkdir -p root/var/log/journal
  touch root/etc/fstab root/etc/.updated root/var/.updated
  # What a machine that does one thing need not do.
  for unit in getty@.service serial-getty@.service systemd-firstboot.service systemd-hwdb-update.service \
    systemd-journal-catalog-update.service systemd-logind.service systemd-networkd.service \
    systemd-pstore.service systemd-random-seed.service systemd-resolved.service systemd-sysusers.service \
    systemd-timesyncd.service systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-user-sessions.service \
    getty-static.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount dev-hugepages.mount dev-mqueue.mount \
    sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount sys-fs-fuse-connections.mount modprobe@configfs.service \
    modprobe@fuse.service modprobe@loop.service fstrim.timer xfs_scrub_all.timer systemd-tmpfiles-clean.timer; do
    ln -sf /dev/null "root/etc/systemd/system/$unit"
  done
  # Each reload runs all of them.
  mkdir -p root/etc/systemd/system-generators
  for unit in root/usr/lib/systemd/system-generators/*; do ln -s /dev/null "root/etc/systemd/system-generators/${unit##*/}"; done
  cat > root/etc/systemd/system/default.target <<'UNIT'
[Unit]
Description=the command of run.sh, once everything else is started
Requires=multi-user.target
After=multi-user.target
Wants=job.service
UNIT
  cat > root/etc/systemd/system/job.service <<'UNIT'
[Unit]
Description=the command of run.sh
After=multi-user.target

[Service]
Type=exec
ExecStart=/bin/sh /run/job/main
UNIT
}

build_system() {
  local work packages deb
  work=$(mktemp -d "$CACHE/build.XXXXXX")
  cd "$work"
  apt_update
  packages=$(system_packages) || die "apt cannot resolve ${SYSTEM_PACKAGES[*]}: $(tail -n 1 "$CACHE/apt/log")"
  [ -n "$packages" ] || die "apt names no packages for ${SYSTEM_PACKAGES[*]}"
  echo "guest: fetching $(wc -l <<< "$packages") packages of a system" >&2
  mkdir debs
  # shellcheck disable=SC2086
  ( cd debs && apt_here apt-get download $packages ) > "$CACHE/apt/log" 2>&1 || die "cannot fetch them: $(tail -n 1 "$CACHE/apt/log")"
  mkdir -p root/usr/{bin,lib,lib64,sbin} root/{dev,etc,mnt,proc,root,run,sys,tmp,var/lib}
  for deb in bin lib lib64 sbin; do ln -s "usr/$deb" "root/$deb"; done
  chmod 1777 root/tmp
  # The packages still name /bin and /lib, which are links here.
  for deb in debs/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C root --keep-directory-symlink \
      --exclude='./usr/share/doc' --exclude='./usr/share/man' --exclude='./usr/share/locale' --exclude='./lib/udev/hwdb.d'
  done
  rm -r debs
  for deb in $(root/bin/busybox --list); do
    [ -e "root/usr/bin/$deb" ] || [ -e "root/usr/sbin/$deb" ] || ln -s busybox "root/usr/bin/$deb"
  done
  # Of udev only what has to do with drives: an emulated machine is slow.
  find root/usr/lib/udev/rules.d -type f | grep -vE -- "$SYSTEM_RULES" | xargs rm
  system_modules
  system_files
  truncate -s "$SYSTEM_SIZE" system.img
  mke2fs -q -t ext4 -d root system.img 2> "$CACHE/apt/log" || die "mke2fs failed: $(tail -n 1 "$CACHE/apt/log")"
  mv system.img "$CACHE/$STAMP/$SYSTEM_STAMP.img"
  cd /
  rm -rf "$work"
}

# Makes the image unless it is there: after `setup`.
setup_system() {
  command -v mke2fs >/dev/null || die "needs mke2fs (package e2fsprogs) for a system with systemd"
  SYSTEM_STAMP=system-$({ declare -f build_system system_packages system_modules system_files depmod_in; declare -p "${!SYSTEM_@}"; } | sha256sum | cut -c1-16)
  exec 9> "$CACHE/lock"
  flock 9
  [ -e "$CACHE/$STAMP/$SYSTEM_STAMP.img" ] || ( build_system )
  exec 9>&-
}

# The rest of the guest's first process where there is a system: programs of the run go into it, then systemd takes over.
system_init() {
  cat <<'INIT'
mkdir /new
mount -t ext4 /dev/drives/system /new
# An image that was not made by root.
[ "$(stat -c %u /new/etc)" = 0 ] || chown -hR 0:0 /new
mkdir -p /new/usr/local/bin
for f in /usr/local/bin/*; do
  [ "${f##*/}" = nvme ] || cp "$f" /new/usr/local/bin/
done
# Libraries that the system lacks; it has its own of those that both know.
for f in $(find /lib /usr/lib -name '*.so*'); do
  [ -e "/new/usr/lib/x86_64-linux-gnu/${f##*/}" ] || cp "$f" /new/usr/lib/x86_64-linux-gnu/
done
mount -t tmpfs -o mode=755 tmpfs /new/run
cp -a /job /new/run/job
cat > /new/run/job/main <<END
export PATH=/usr/local/bin:/usr/sbin:/usr/bin HOME=/root
cd /tmp
echo begun > $(port rc)
sh /run/job/command < /dev/null > $(port stdout) 2>&1
echo \$? > $(port rc)
systemctl --no-block poweroff
END
umount /dev/shm
for f in dev proc sys; do mount --move /$f /new/$f; done
exec switch_root /new /lib/systemd/systemd
INIT
}
