//go:build faults

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
)

// faultsVariable has the rules, as fault.Parse reads them, or @ and the name of
// a file that has them. The file is read again at each step, so that a test
// changes them while the daemon runs; beside it, as FILE.struck, is written what
// has struck, a line for each time.
const faultsVariable = "WORKSPACED_FAULTS"

// hangTime is how long a step hangs: as if its deadline were that short.
const hangTime = 200 * time.Millisecond

var faults = loadFaults()

// loadFaults reads the variable, and removes it: it is no setting.
func loadFaults() *faultFile {
	f := &faultFile{injector: fault.New()}
	f.injector.Kill = f.kill
	value := os.Getenv(faultsVariable)
	if path, ok := strings.CutPrefix(value, "@"); ok {
		f.path = path
	} else {
		f.set(value)
	}
	if err := os.Unsetenv(faultsVariable); err != nil {
		panic(err)
	}
	return f
}

// faultPoints returns what the daemon's steps are passed through.
func faultPoints() fault.Around { return faults.around }

// faultFile is an injector whose rules stand in a file.
type faultFile struct {
	path     string // empty: the rules never change
	injector *fault.Injector

	mu    sync.Mutex
	rules string
	lines int // reported
}

// around does a step as the newest rules say. Only a hang notices the shorter
// deadline, not the step.
func (f *faultFile) around(ctx context.Context, step string, do func(context.Context) error) error {
	f.reload()
	defer f.report()
	short, cancel := context.WithTimeout(ctx, hangTime)
	defer cancel()
	return f.injector.Around(short, step, func(context.Context) error {
		err := do(ctx)
		f.reload() // it may have taken its time
		return err
	})
}

func (f *faultFile) reload() {
	if f.path == "" {
		return
	}
	text, err := os.ReadFile(f.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		panic(err)
	}
	f.set(string(text))
}

// set takes over rules that differ from those in force, which go on counting.
func (f *faultFile) set(text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if text = strings.TrimSpace(text); text == f.rules {
		return
	}
	rules, err := fault.Parse(text)
	if err != nil {
		panic(fmt.Errorf("%s: %w", faultsVariable, err))
	}
	f.rules = text
	f.injector.Set(rules...)
}

// report writes down what has struck since the last time.
func (f *faultFile) report() {
	if f.path == "" {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var text strings.Builder
	lines := 0
	for strike, times := range f.injector.Strikes() {
		for range times {
			fmt.Fprintf(&text, "%s:%s:%s\n", strike.Step, strike.Moment, strike.Action)
			lines++
		}
	}
	if lines == f.lines {
		return
	}
	f.lines = lines
	// As a whole: who reads it meanwhile reads the one or the other.
	if err := errors.Join(os.WriteFile(f.path+".new", []byte(text.String()), 0o600), os.Rename(f.path+".new", f.path+".struck")); err != nil {
		panic(err)
	}
}

// kill ends this process as kill -9 does, and says in the log whose doing it was.
func (f *faultFile) kill() {
	f.mu.Lock()
	rules := f.rules
	f.mu.Unlock()
	fmt.Fprintf(os.Stderr, "%s: killed by %s\n", faultsVariable, rules)
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // until it has come
}
