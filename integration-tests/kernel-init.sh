#!/bin/busybox sh
# The first process of the machine that fetch-kernel.sh makes. At 10.9.0.2, whoever connects to port 9 has a shell,
# and to port 7 an echo; there is nobody on its cable but the test.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module" || echo "cannot load $module"
done </modules/order
ip link set lo up
ip addr add 10.9.0.2/24 dev eth0
ip link set eth0 up
nc -ll -p 7 -e cat &
nc -ll -p 9 -e sh &
wait
