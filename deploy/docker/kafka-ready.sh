#!/bin/bash
# Checks that the broker answers: sends an ApiVersions request and reads the error code of the answer.
# Kafka's own tools start a JVM, which takes a second of CPU time per check.
set -eu
exec 3<>"/dev/tcp/127.0.0.1/${1:-9092}"
# size 15 | ApiVersions (18), version 0 | correlation id 1 | client id "ready"
printf '\x00\x00\x00\x0f\x00\x12\x00\x00\x00\x00\x00\x01\x00\x05ready' >&3
# size (4 bytes), correlation id (4), error code (2)
answer=$(head -c 10 <&3 | od -An -v -tx1 | tr -d ' \n')
[ "${answer:8:12}" = 000000010000 ]
