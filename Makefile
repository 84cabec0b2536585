# `make` or `make help` says what there is. Everything is built as the user who
# runs make; only what must be root (apt-get, the daemon, tests of containers)
# asks sudo for itself.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# What buf compares the API with; see tools/breaking.sh for the default.
BREAKING_BASE ?=

export PATH := $(CURDIR)/bin/tools:$(PATH):/usr/sbin:/sbin
# git refuses to describe another user's checkout, which must not stop a build.
# All that is compiled is compiled alike, and so once: programs, tools, what vet
# and lint read, simulations. Only the race detector's is another.
export GOFLAGS := $(GOFLAGS) -buildvcs=false -trimpath
export CGO_ENABLED := 0
unexport VERSION BREAKING_BASE

SUDO := $(if $(filter-out 0,$(shell id -u)),sudo,)

##@ Use

.PHONY: help
help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} \
		/^##@ / {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: run
run: deps build bin/tools/grpcurl ## Start the daemon, say how to talk to it, end with Ctrl-C
	@$(SUDO) bin/demo run

.PHONY: demo
demo: deps build ## Prove the main job on real containers: many changes, one restart
	@$(SUDO) bin/demo prove

##@ Develop

.PHONY: build
build: ## Build the static binaries into bin/
	go build -ldflags '-X main.version=$(VERSION)' -o bin/ ./cmd/workspaced ./cmd/demo
	go build -ldflags '-s -w' -o bin/ ./cmd/demo/envserver
	go build -ldflags '-s -w -E workspace_init_entry' -o bin/ ./cmd/workspace-init

.PHONY: test
test: deps-test build testprog probe containerd23 bin/tools/grpcurl bin/tools/testreport ## Run all tests: race detector, real containerd, leak check (TEST=./store/... for some)
	@go -C tools test ./testreport
	@tools/test.sh $(TEST)

# Part of make test, which does not show what was searched.
.PHONY: canary
canary: deps-test build testprog containerd23 ## Set secrets by every route, then look for them in all that was written and said
	@WORKSPACED_BIN_DIR=$(CURDIR)/bin CGO_ENABLED=1 GOFLAGS=-buildvcs=false \
		go test -race -vet=off -count=1 -v -exec $(CURDIR)/tools/sandbox.sh -run '^TestContract(17|21)_' ./store ./server ./runtime/ctrd ./cmd/demo/e2e

.PHONY: check
check: static test ## Run every check, then all tests

.PHONY: generate
generate: protodeps bin/tools/buf bin/tools/protoc-gen-go bin/tools/protoc-gen-go-grpc ## Generate gen/ from proto/, offline
	buf generate

.PHONY: bench
bench: bench-build ## Measure beside floors and rivals, into bin/bench.json (WHAT=row for one)
	@tools/sandbox.sh bin/bench --json bin/bench.json $(if $(WHAT),--what $(WHAT))

.PHONY: bench-report
bench-report: bench-build ## The same, all of it, and write docs/benchmarks.md
	@tools/sandbox.sh bin/bench --json bin/bench.json --report docs/benchmarks.md --command 'make $@'

.PHONY: bench-build
bench-build: deps-test build probe
	go build -ldflags '-s -w' -o bin/ ./cmd/bench
	@go -C cmd/bench/rivals vet . && go -C cmd/bench/rivals test . # here only: etcd takes minutes to build
	go -C cmd/bench/rivals build -ldflags '-s -w' -o $(CURDIR)/bin/bench-rivals .

.PHONY: microbench
microbench: deps-test build testprog containerd23 ## Run Go's benchmarks of single packages (BENCH=regexp for some)
	@WORKSPACED_BIN_DIR=$(CURDIR)/bin go test -run '^$$' -bench '$(or $(BENCH),.)' -benchmem -timeout 30m \
		-exec $(CURDIR)/tools/sandbox.sh \
		$$(grep -rl --include='*_test.go' '^func Benchmark' cmd runtime server store | xargs -r dirname | sort -u | sed 's,^,./,')

.PHONY: model
model: ## Check the model of the protocol with spin, and that it sees every mutant
	@tools/install-deps.sh model
	@docs/model/check.sh

# Simulations need neither root nor containerd.
SIM := go test ./server/servertest/sim -count=1 -timeout 0 -v
SOAK ?= 60s

.PHONY: sim
sim: ## Run 10,000 random worlds with faults and crashes (SEEDS=n for another number)
	@$(SIM) -run '^TestSeeds$$' -seeds=$(or $(SEEDS),10000)
	@$(SIM) -run '^TestLinear$$' -seeds=1000

.PHONY: soak
soak: ## Run random worlds that nobody has seen, for SOAK=60s, and print what was tried
	@$(SIM) -run '^Test(Seeds|Linear)$$' -soak=$(SOAK)

.PHONY: fuzz
fuzz: ## Run every fuzz target in turn, for FUZZ=30s each
	@tools/fuzz.sh $(or $(FUZZ),30s)

.PHONY: kms
kms: ## Run the tests of key services against real ones: local-kms, and KEYS="URI URI", of two keys
	@tools/kms.sh $(KEYS)

.PHONY: clean
clean: ## Remove what make built, except the tools
	rm -rf bin/workspaced bin/workspaced-faults bin/workspace-init bin/demo bin/envserver bin/testprog bin/bench bin/bench-probe bin/bench-rivals bin/bench.json bin/containerd-2.3 .protodeps coverage.out

.PHONY: distclean
distclean: ## Remove everything that make built
	rm -rf bin .protodeps coverage.out

##@ Single checks

.PHONY: static
static: format vet lint proto breaking generated tidy vulncheck ## All of these

.PHONY: format
format: bin/tools/buf ## gofmt and buf format
	@unformatted=$$(git ls-files -co --exclude-standard '*.go' | xargs gofmt -l); \
		[[ -z $$unformatted ]] || { echo "not gofmt'ed:"; echo "$$unformatted"; exit 1; }
	buf format --diff --exit-code proto

.PHONY: vet
vet: ## go vet, our own tools included
	go vet ./...
	go -C tools vet ./...
	GOARCH=arm64 go vet ./cmd/workspace-init # its assembler, which nothing else looks at here
	GOARCH=arm64 go build -ldflags '-E workspace_init_entry' -o /dev/null ./cmd/workspace-init

.PHONY: lint
lint: bin/tools/golangci-lint ## golangci-lint
	golangci-lint run

.PHONY: proto
proto: protodeps bin/tools/buf ## buf lint
	buf lint

.PHONY: breaking
breaking: protodeps bin/tools/buf ## buf breaking against main (BREAKING_BASE=commit for another)
	@tools/breaking.sh $(BREAKING_BASE)

.PHONY: generated
generated: protodeps bin/tools/buf bin/tools/protoc-gen-go bin/tools/protoc-gen-go-grpc ## Is gen/ what proto/ generates?
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
		buf generate --output "$$tmp" && diff -r gen "$$tmp/gen" || \
		{ echo 'gen/ is out of date: run make generate'; exit 1; }

.PHONY: tidy
tidy: ## go mod tidy, as a check
	go mod tidy -diff
	go -C tools mod tidy -diff

.PHONY: vulncheck
vulncheck: bin/tools/govulncheck ## govulncheck, where its database can be reached
	@tools/vulncheck.sh

##@ Parts of the above

.PHONY: deps
deps: ## Install containerd and runc when missing
	@tools/install-deps.sh

.PHONY: deps-test
deps-test: ## Also install what the race detector needs
	@tools/install-deps.sh test

.PHONY: testprog
testprog: ## Build the program that tests run in containers, and the daemon that fails on purpose
	go build -ldflags '-s -w' -o bin/ ./runtime/ctrd/ctrdtest/testprog
	go build -tags faults -o bin/workspaced-faults ./cmd/workspaced

# What the benchmark runs in containers; without a C library, see its source.
.PHONY: probe
probe: ## Build the benchmark's probe
	@mkdir -p bin
	gcc -O2 -Wall -Wextra -Werror -static -nostdlib -ffreestanding -fno-stack-protector -s -o bin/bench-probe cmd/bench/probe/probe.c

# The containerd that Debian does not have yet, for tests against both.
CONTAINERD_CMD := github.com/containerd/containerd/v2/cmd
.PHONY: containerd23
containerd23: bin/containerd-2.3/containerd ## Build containerd 2.3 and its shim into bin/containerd-2.3/
bin/containerd-2.3/containerd: tools/containerd/go.mod tools/containerd/go.sum
	@echo 'building containerd 2.3 from its Go module, once'
	@go -C tools/containerd build -tags 'no_btrfs no_cri no_devmapper no_zfs' \
		-o $(CURDIR)/bin/containerd-2.3/ $(CONTAINERD_CMD)/containerd $(CONTAINERD_CMD)/containerd-shim-runc-v2
	@touch $@

.PHONY: protodeps
protodeps: .protodeps/buf/validate/validate.proto ## Write the .proto files that ours import into .protodeps/
.protodeps/buf/validate/validate.proto: tools/protodeps/main.go tools/go.mod tools/go.sum
	@go -C tools run ./protodeps $(CURDIR)/.protodeps

.PHONY: tools
tools: $(addprefix bin/tools/,buf protoc-gen-go protoc-gen-go-grpc grpcurl golangci-lint govulncheck testreport) ## Build all tools into bin/tools/

# Each tool has a go.mod of its own, which pins its version and those of all it
# is made of. It is built once for these and for this version of Go.
bin/tools/buf: PACKAGE = github.com/bufbuild/buf/cmd/buf
bin/tools/protoc-gen-go: PACKAGE = google.golang.org/protobuf/cmd/protoc-gen-go
bin/tools/protoc-gen-go-grpc: PACKAGE = google.golang.org/grpc/cmd/protoc-gen-go-grpc
bin/tools/grpcurl: PACKAGE = github.com/fullstorydev/grpcurl/cmd/grpcurl
bin/tools/golangci-lint: PACKAGE = github.com/golangci/golangci-lint/v2/cmd/golangci-lint
bin/tools/govulncheck: PACKAGE = golang.org/x/vuln/cmd/govulncheck
bin/tools/testreport: PACKAGE = ./testreport

bin/tools/buf: tools/buf/go.mod tools/buf/go.sum
bin/tools/protoc-gen-go bin/tools/protoc-gen-go-grpc: tools/protoc-gen/go.mod tools/protoc-gen/go.sum
bin/tools/grpcurl: tools/grpcurl/go.mod tools/grpcurl/go.sum
bin/tools/golangci-lint: tools/golangci-lint/go.mod tools/golangci-lint/go.sum
bin/tools/govulncheck: tools/govulncheck/go.mod tools/govulncheck/go.sum
bin/tools/testreport: tools/go.mod tools/testreport/main.go

bin/tools/%: bin/tools/.go-version
	@echo 'building $*, once'
	@go -C $(dir $(filter %/go.mod,$^)) build -o $(CURDIR)/$@ $(PACKAGE)
	@touch $@

# Changes only when the version of Go does.
bin/tools/.go-version: always
	@mkdir -p $(@D)
	@go env GOVERSION | cmp -s - $@ || go env GOVERSION >$@
.PHONY: always
always:
