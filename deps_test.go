package workspaced_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/workspaced/workspaced"

// rule is one row of the import table in docs/architecture.md. It counts for a
// package and those below it that have no row of their own.
type rule struct {
	pkg string
	// imports are what the package may import of this repository.
	imports []string
	// modules are the modules of others it may import; nil: any.
	modules []string
	// std: nothing but the standard library is reached, by way of others either.
	std bool
	// never are import paths, with all below them, that are not reached.
	never []string
}

const (
	gen        = module + "/gen"
	containerd = "github.com/containerd/containerd"
	grpc       = "google.golang.org/grpc"
	registry   = "github.com/google/go-containerregistry"
)

var table = []rule{
	{pkg: "gen", imports: nil, never: []string{containerd, registry}},
	{
		pkg:     "store/seal",
		modules: []string{"github.com/tink-crypto/tink-go/v2"},
		never:   []string{grpc, containerd},
	},
	{
		pkg:     "store/seal/kek",
		imports: []string{"store/seal"},
		modules: []string{
			"github.com/tink-crypto/tink-go/v2",
			"github.com/tink-crypto/tink-go-awskms/v3", "github.com/aws/aws-sdk-go-v2", "github.com/aws/aws-sdk-go-v2/config",
			"github.com/aws/aws-sdk-go-v2/service/kms", "github.com/aws/smithy-go",
			"github.com/tink-crypto/tink-go-gcpkms/v2", "google.golang.org/api", grpc,
		},
		never: []string{containerd, gen},
	},
	// For tests.
	{pkg: "store/seal/kek/kektest", imports: []string{"store/seal"}, modules: []string{}, never: []string{containerd, gen, grpc}},
	{pkg: "store/seal/canary", imports: []string{}, modules: []string{"github.com/klauspost/compress"}, never: []string{gen, grpc, containerd}},
	{
		pkg:     "store",
		imports: []string{"store/seal", "store"},
		modules: []string{"go.etcd.io/bbolt", "github.com/google/uuid"},
		never:   []string{grpc, containerd, gen},
	},
	{pkg: "runtime", imports: []string{}, std: true},
	{
		pkg:     "runtime/ctrd",
		imports: []string{"runtime", "runtime/ctrd", "runtime/ctrd/handshake"},
		never:   []string{gen, registry},
	},
	{
		pkg:     "runtime/ctrd/ctrdtest",
		imports: []string{"runtime", "runtime/ctrd", "runtime/ctrd/handshake", "runtime/ctrd/ctrdtest"},
		never:   []string{gen},
	},
	{
		pkg:     "runtime/runtimetest",
		imports: []string{"runtime", "runtime/runtimetest"},
		never:   []string{gen, grpc, containerd},
	},
	{pkg: "runtime/runtimetest/fault", imports: []string{}, std: true},
	{
		pkg:     "server/workspace",
		imports: []string{"store", "store/seal", "runtime", "server/workspace"},
		never:   []string{gen, grpc, containerd, registry},
	},
	{
		pkg:     "server",
		imports: []string{"gen", "server", "server/access", "server/loop", "server/workspace", "store", "store/seal", "runtime"},
		never:   []string{containerd, registry},
	},
	{pkg: "server/access", imports: []string{"gen", "server/access", "store"}, never: []string{containerd, registry}},
	{
		pkg:     "server/loop",
		imports: []string{},
		modules: []string{"github.com/cenkalti/backoff/v5"},
		never:   []string{gen, grpc, containerd, registry},
	},
	{
		pkg:     "server/servertest",
		imports: []string{"gen", "server", "server/access", "server/loop", "server/workspace", "server/servertest", "store", "store/seal", "runtime", "runtime/runtimetest", "runtime/runtimetest/fault"},
		never:   []string{containerd, registry},
	},
	// The protocol between driver and workspace-init.
	{pkg: "runtime/ctrd/handshake", imports: []string{}, std: true},
	{pkg: "cmd/workspace-init", imports: []string{"cmd/workspace-init", "runtime/ctrd/handshake"}, std: true},
}

// goPackage is what `go list` says of a package.
type goPackage struct {
	ImportPath string
	Imports    []string
	Standard   bool
	Module     *struct{ Path string }
}

func TestImportTable(t *testing.T) {
	packages := list(t)
	for path, pkg := range packages {
		own, ok := strings.CutPrefix(path, module+"/")
		if !ok {
			continue
		}
		rule, ok := ruleOf(own)
		if !ok {
			continue
		}
		for _, imported := range pkg.Imports {
			checkImport(t, rule, packages, path, imported)
		}
		for _, chain := range reach(packages, path) {
			reached := packages[chain[len(chain)-1]]
			if rule.std && !reached.Standard && !isOwn(reached.ImportPath) {
				t.Errorf("%s has to do with the standard library alone: %s", path, strings.Join(chain, " -> "))
			}
			for _, never := range rule.never {
				if isBelow(reached.ImportPath, never) {
					t.Errorf("%s must not reach %s: %s", path, never, strings.Join(chain, " -> "))
				}
			}
		}
	}
}

// What the table says from the other end: who may import these.
func TestImportersOf(t *testing.T) {
	importers := []struct {
		imported string
		by       []string
	}{
		{containerd, []string{"runtime/ctrd", "cmd/bench"}}, // a rival of the benchmark
		{gen, []string{"server", "cmd", "gen"}},
		{"go.etcd.io/bbolt", []string{"store", "cmd/bench"}},
		{"github.com/tink-crypto/tink-go/v2", []string{"store/seal"}},
		// What key services drag in comes by the daemon alone.
		{module + "/store/seal/kek", []string{"cmd/workspaced", "store/seal/kek"}},
		{module + "/store/seal/kek/kektest", nil}, // tests
		{module + "/runtime/ctrd", []string{"cmd", "runtime/ctrd"}},
		{module + "/store/seal/canary", nil}, // tests
		{"github.com/klauspost/compress", []string{"store/seal/canary"}},
	}
	packages := list(t)
	for _, row := range importers {
		t.Run(row.imported, func(t *testing.T) {
			for path, pkg := range packages {
				own, ok := strings.CutPrefix(path, module+"/")
				if !ok || slices.ContainsFunc(row.by, func(by string) bool { return isBelow(own, by) }) {
					continue
				}
				for _, imported := range pkg.Imports {
					if isBelow(imported, row.imported) {
						t.Errorf("%s imports %s; only %v may", path, imported, row.by)
					}
				}
			}
		})
	}
}

func checkImport(t *testing.T, rule rule, packages map[string]goPackage, path, imported string) {
	t.Helper()
	pkg, ok := packages[imported]
	switch own, isOwn := strings.CutPrefix(imported, module+"/"); {
	case !ok || pkg.Standard:
	case isOwn:
		if !slices.ContainsFunc(rule.imports, func(may string) bool { return covers(may, own) }) {
			t.Errorf("%s may not import %s, only %v of this repository", path, own, rule.imports)
		}
	case rule.modules != nil && pkg.Module != nil && !slices.Contains(rule.modules, pkg.Module.Path):
		t.Errorf("%s may not import %s, only the modules %v", path, imported, rule.modules)
	}
}

// ruleOf finds the row that counts for a package, by the longest match.
func ruleOf(own string) (rule, bool) {
	var best rule
	for _, row := range table {
		if isBelow(own, row.pkg) && len(row.pkg) > len(best.pkg) {
			best = row
		}
	}
	return best, best.pkg != ""
}

// covers tells whether the permission to import row.pkg holds for own: those
// below are meant as well unless they have a row of their own.
func covers(may, own string) bool {
	if !isBelow(own, may) {
		return false
	}
	row, ok := ruleOf(own)
	return !ok || isBelow(may, row.pkg)
}

func isBelow(path, top string) bool {
	return path == top || strings.HasPrefix(path, top+"/")
}

func isOwn(path string) bool { return isBelow(path, module) }

// reach returns for each package that path reaches the shortest chain of
// imports to it.
func reach(packages map[string]goPackage, path string) [][]string {
	seen := map[string]bool{path: true}
	var chains [][]string
	for queue := [][]string{{path}}; len(queue) > 0; queue = queue[1:] {
		chain := queue[0]
		for _, next := range packages[chain[len(chain)-1]].Imports {
			if seen[next] {
				continue
			}
			if _, ok := packages[next]; !ok {
				continue // "C" and the like
			}
			seen[next] = true
			longer := append(slices.Clone(chain), next)
			chains = append(chains, longer)
			queue = append(queue, longer)
		}
	}
	return chains
}

// list asks `go list -deps` for every package of the module and what it reaches.
// Tests of the packages don't count: they may import what they like.
func list(t *testing.T) map[string]goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-json=ImportPath,Imports,Standard,Module", "./...")
	out, err := cmd.Output()
	if err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			t.Fatalf("%v: %v\n%s", cmd, err, exit.Stderr)
		}
		t.Fatalf("%v: %v", cmd, err)
	}
	packages := make(map[string]goPackage)
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; {
		var pkg goPackage
		err := decoder.Decode(&pkg)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("decode the output of %v: %v", cmd, err)
		}
		packages[pkg.ImportPath] = pkg
	}
	if _, ok := packages[gen+"/workspace/v1"]; !ok {
		t.Fatalf("%v does not list gen/workspace/v1", cmd)
	}
	return packages
}

// TestEveryPromiseHasATest holds the table of guarantees in docs/architecture.md:
// each promise of the contract, and each package that is said to test it.
func TestEveryPromiseHasATest(t *testing.T) {
	doc, err := os.ReadFile("docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile(`(?m)^\| (\d\d) \| .* \| (.*) \|$`).FindAllStringSubmatch(string(doc), -1)
	if len(rows) != 23 {
		t.Errorf("the table has %d promises, want 23", len(rows))
	}
	for _, row := range rows {
		for _, dir := range strings.Split(row[2], ", ") {
			dir = strings.Trim(dir, "`")
			files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
			if err != nil {
				t.Fatal(err)
			}
			found := slices.ContainsFunc(files, func(file string) bool {
				source, err := os.ReadFile(file)
				return err == nil && strings.Contains(string(source), "func TestContract"+row[1]+"_")
			})
			if !found {
				t.Errorf("promise %s: %s has no TestContract%s_", row[1], dir, row[1])
			}
		}
	}
}
