package ctrdtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

const (
	module      = "github.com/workspaced/workspaced"
	initPackage = "cmd/workspace-init"
)

// built keeps programs in memory, so that no test leaves a file behind and each
// is built once.
var built struct {
	sync.Mutex
	programs map[string][]byte
}

// Program returns a static build of a package of this module: the one that is
// in $WORKSPACED_BIN_DIR, or one that is built now.
func Program(tb testing.TB, pkg string) []byte {
	tb.Helper()
	built.Lock()
	defer built.Unlock()
	if b := built.programs[pkg]; b != nil {
		return b
	}
	if dir := os.Getenv("WORKSPACED_BIN_DIR"); dir != "" {
		if b, err := os.ReadFile(filepath.Join(dir, filepath.Base(pkg))); err == nil {
			return b
		}
	}
	out := filepath.Join(tb.TempDir(), "program")
	cmd := exec.CommandContext(tb.Context(), "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w"+entry(pkg), "-o", out, module+"/"+pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("building %s: %v\n%s", pkg, err, text)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		tb.Fatal(err)
	}
	if built.programs == nil {
		built.programs = make(map[string][]byte)
	}
	built.programs[pkg] = b
	return b
}

// entry is what the linker has to be told of workspace-init.
func entry(pkg string) string {
	if pkg == initPackage {
		return " -E workspace_init_entry"
	}
	return ""
}

// InitPath returns the path of workspace-init: $WORKSPACED_BIN_DIR's, or one
// that is built now.
func InitPath(tb testing.TB) string {
	tb.Helper()
	if dir := os.Getenv("WORKSPACED_BIN_DIR"); dir != "" {
		path := filepath.Join(dir, "workspace-init")
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	path := filepath.Join(tb.TempDir(), "workspace-init")
	if err := os.WriteFile(path, Program(tb, initPackage), 0o755); err != nil {
		tb.Fatal(err)
	}
	return path
}
