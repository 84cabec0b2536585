// Package rows has the benchmark's rows, each in a file of its own: a figure of
// workspaced beside its physical floor or a rival, measured in turn in one run.
package rows

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

// Env is where rows run.
type Env struct {
	// BinDir has the programs that make has built.
	BinDir string
	// Dir is a directory on a disk, empty at first. Rows share it.
	Dir string
	// Log gets a row's progress.
	Log io.Writer
}

// Row is a row of the benchmark.
type Row struct {
	// Name chooses it: make bench WHAT=name.
	Name string
	// What says what it measures.
	What string
	// Limit ends it if it hangs.
	Limit time.Duration
	// Run measures. It leaves nothing behind.
	Run func(ctx context.Context, env *Env) ([]measure.Result, error)
}

// All are the rows, in the order in which they run.
var All = []Row{
	downtimeRow,
	cycleRow,
	throughputRow,
	secretRow,
	kickRow,
	readRow,
	watchRow,
	interceptorsRow,
	idleRow,
	daemonRow,
}

// program returns the path of a program in BinDir.
func (e *Env) program(name string) (string, error) {
	path := filepath.Join(e.BinDir, name)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w: run make bench, which builds it", err)
	}
	return path, nil
}

// temp makes a directory of a row's own; remove removes it.
func (e *Env) temp(name string) (dir string, remove func() error, err error) {
	dir, err = os.MkdirTemp(e.Dir, name)
	return dir, func() error { return os.RemoveAll(dir) }, err
}

func (e *Env) logf(format string, args ...any) {
	fmt.Fprintf(e.Log, "  "+format+"\n", args...)
}

// pause waits, unless ctx ends before.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
