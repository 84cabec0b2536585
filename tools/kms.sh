#!/usr/bin/env bash
# Runs the suite of key services (store/seal/kek) against real ones: local-kms, which
# speaks AWS KMS and is built from its Go module, and those that the arguments name,
# two keys each. What their programs are told by (VAULT_TOKEN_FILE, AWS_PROFILE,
# GOOGLE_APPLICATION_CREDENTIALS...) is told here too.
set -euo pipefail
cd "$(dirname "$0")/.."

test_keys() {
	WORKSPACED_KEY_URIS="$*" go test -tags kms ./store/seal/kek -count=1 -v -run '^TestReal$'
}

if (($#)); then
	test_keys "$@"
fi

dir=$(mktemp -d)
trap 'kill "${pid:-}" 2>/dev/null || true; rm -rf "$dir"' EXIT
GOBIN=$PWD/bin/tools go install github.com/nsmithuk/local-kms@v0.0.0-20260228092603-2a5e92d09ab6
one=bc436485-5092-42b8-92a3-0aa8b93536dc
two=49c5492b-b1bc-42a8-9a5c-b2015e810c1c
cat >"$dir/seed.yaml" <<EOF
Keys:
  Symmetric:
    Aes:
      - Metadata: {KeyId: $one}
        BackingKeys: [$(openssl rand -hex 32)]
      - Metadata: {KeyId: $two}
        BackingKeys: [$(openssl rand -hex 32)]
EOF
port=$((20000 + RANDOM % 10000))
KMS_ACCOUNT_ID=111122223333 KMS_REGION=eu-west-2 KMS_DATA_PATH=$dir KMS_SEED_PATH=$dir/seed.yaml PORT=$port bin/tools/local-kms >"$dir/log" 2>&1 &
pid=$!
for _ in {1..50}; do
	if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then break; fi
	sleep 0.1
done
export AWS_ENDPOINT_URL_KMS=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any
test_keys "aws-kms://arn:aws:kms:eu-west-2:111122223333:key/$one" "aws-kms://arn:aws:kms:eu-west-2:111122223333:key/$two" ||
	{ cat "$dir/log"; exit 1; }
