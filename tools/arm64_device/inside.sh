#!/bin/sh
# The first process of the place: runs inside fresh user, mount, network and PID namespaces, and ends with them.
# Arguments: prepared folder, state folder, CPU model, port, size of /data/local/tmp in MiB, adb program.
set -eu
prepared=$1 state=$2 cpu=$3 port=$4 disk_mib=$5 adb=$6
root=$prepared/root

ip link set lo up

# A binfmt_misc of this user namespace (Linux 6.7 and newer): the machine's own registrations are not touched.
# F: the interpreter is opened now, and found from inside the chroot; P: programs keep their argv[0].
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
printf '%s' ":arm64:M::$magic:$mask:$prepared/qemu-aarch64:FP" >/proc/sys/fs/binfmt_misc/register

# What is prepared is shared by all places and stays as it is: only the folders below are theirs.
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys" # without /sys XNNPACK is silently not used
mount -t proc proc "$root/proc"
mount -t tmpfs -o "size=${disk_mib}m,mode=0777" tmpfs "$root/data/local/tmp"
mount -t tmpfs -o size=64m,mode=1777 tmpfs "$root/tmp"

# The server of this network's adb listens on a socket in the file system: that is the only way in.
HOME=$state "$adb" -L "localfilesystem:$state/adb.socket" server nodaemon >"$state/adb-server.log" 2>&1 &

# Not 5555: adb takes that port for an emulator of its own, and would list the device twice.
while :; do
    env -i PATH=/usr/bin:/usr/sbin HOME=/data/local/tmp TMPDIR=/tmp ADBD_PORT="$port" QEMU_CPU="$cpu" \
        PYTHONPATH=/opt/site LD_LIBRARY_PATH=/usr/lib/aarch64-linux-gnu/android \
        MTP_PLACE=arm64-emulated MTP_EMULATOR="$(cat "$prepared/emulator-version")" \
        /usr/sbin/chroot "$root" /usr/lib/android-sdk/platform-tools/adbd >>"$state/adbd.log" 2>&1 || true
    sleep 0.2 # it was killed: come back, as init does on a phone
done
