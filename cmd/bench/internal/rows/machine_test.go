package rows

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// containerEnv is where a test runs rows. It skips where there are no real containers.
func containerEnv(t *testing.T) *Env {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: real containers need root")
	}
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "runc"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("NOT TESTED: %v", err)
		}
	}
	bin := os.Getenv("WORKSPACED_BIN_DIR")
	if _, err := os.Stat(filepath.Join(bin, probeProgram)); err != nil || !filepath.IsAbs(bin) {
		t.Skipf("NOT TESTED: no %s in $WORKSPACED_BIN_DIR; make probe builds it", probeProgram)
	}
	// Not t.TempDir: that is too long for a socket's address.
	dir, err := os.MkdirTemp("", "b")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil { // rows leave nothing in it
			t.Error(err)
		}
	})
	return &Env{BinDir: bin, Dir: dir, Log: t.Output()}
}

// testMachine is a machine that is closed when the test ends.
func testMachine(t *testing.T, around aroundFunc) *machine {
	t.Helper()
	m, err := startMachine(t.Context(), containerEnv(t), around)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.close(t.Context()); err != nil {
			t.Error(err)
		}
	})
	return m
}

func TestMachine(t *testing.T) {
	m := testMachine(t, nil)
	if err := m.create(t.Context(), "w", 100); err != nil {
		t.Fatal(err)
	}
	if err := m.restart(t.Context(), "w"); err != nil {
		t.Fatal(err)
	}
	got, err := m.records("w")
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 3 || got[0].End || !got[1].End || got[2].End {
		t.Fatalf("records %+v, want a start, its end, and a start", got)
	}
	if got[0].Generation != 1 || got[2].Generation != 2 || got[0].PID != 1 || got[2].PID != 1 {
		t.Errorf("records %+v, want generations 1 and 2 of process 1", got)
	}
	if down := got[2].At - got[1].At; down <= 0 || got[1].At < got[0].At {
		t.Errorf("records %+v are not in order", got)
	}
}
