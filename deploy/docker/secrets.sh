#!/bin/sh
# Makes the passwords and tokens of this deployment at its first start. Each container gets a volume of its own, mounted
# here below /secrets. A file that exists is kept: remove it, and start again, to change the secret.
set -eu

make() { # VOLUME FILE
  file="/secrets/$1/$2"
  if [ -s "$file" ]; then return; fi
  # 256 bits, as letters, digits, - and _
  head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n' >"$file.new"
  chmod 0444 "$file.new"
  mv "$file.new" "$file"
  echo "made $1/$2"
}

for name in postgres optimizer evaluator ledger operator; do make "$name" database-password; done
make evaluator evaluations-token
make router draw-key
# The same key in every service that draws, and the token also where `sprout evaluate` sends it from.
[ -s /secrets/evaluator/draw-key ] || cp /secrets/router/draw-key /secrets/evaluator/draw-key
[ -s /secrets/operator/evaluations-token ] || cp /secrets/evaluator/evaluations-token /secrets/operator/evaluations-token
