package ctrd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
)

// life is a workspace that goes from one generation to the next, by way of a
// driver whose steps pass through an injector.
type life struct {
	*testing.T
	e        *ctrdtest.Env
	registry *ctrdtest.Registry
	image    v1.Image
	archive  string // the same
	in       *fault.Injector
	d        *ctrd.Driver

	fault    faultCase
	rules    []fault.Rule // for it
	strikes  int          // before it
	try      int          // how often it was waited for in vain
	reopened bool

	spec       runtime.Spec
	generation int64
	running    runtime.Instance // as it was last seen
	stopped    bool             // Stop was called for it

	watching sync.WaitGroup
	unwatch  context.CancelFunc
	watched  string // the instance's id
}

func newLife(t *testing.T, c *ctrdtest.Containerd, registry *ctrdtest.Registry, image v1.Image, archive string) *life {
	l := &life{
		T: t, e: ctrdtest.NewEnv(t, c), registry: registry, image: image, archive: archive, in: fault.New(), unwatch: func() {},
	}
	l.spec = runtime.Spec{
		WorkspaceID: "w", WorkspaceUID: "uid-w", User: ctrdtest.UserName,
		Mounts: []runtime.Mount{{Path: "/data", Volume: "data"}},
	}
	l.open()
	l.reach()
	return l
}

func (l *life) open() {
	l.Helper()
	l.d = l.e.NewDriver(l, func(cfg *ctrd.Config) { cfg.Around, cfg.Logger = l.in.Around, slog.New(slog.DiscardHandler) })
	l.d.LimitDeadlines(3 * time.Second)
}

// end ends the daemon, whose instances run on.
func (l *life) end() {
	l.unwatch()
	l.watching.Wait()
	l.watched = ""
	if err := l.d.Close(); err != nil {
		l.Error(err)
	}
}

// reach brings the workspace to its next generation.
func (l *life) reach() {
	l.Helper()
	l.generation += 2 // it is started with the one before, and takes in this one
	l.spec.Generation = l.generation
	l.spec.Image = l.registry.Push(l, fmt.Sprintf("%s:%d", l.e.Namespace, l.generation), l.image)
	l.stopped = false
	l.until("the cycle", l.pass)
}

// pass goes on from what is there, as an actor's passes do.
func (l *life) pass(ctx context.Context) error {
	list, err := l.d.List(ctx, l.spec.WorkspaceUID)
	if err != nil {
		return err
	}
	var old, standby *runtime.Instance
	for i, in := range list {
		switch {
		case in.Phase == runtime.PhaseRunning && in.Generation == l.generation:
			l.running = in
			l.watch(in.ID)
			return l.clean(ctx, list, in.ID)
		case in.Phase == runtime.PhaseRunning && in.Generation == l.generation-1:
			l.running = in
			l.watch(in.ID)
			_, err := l.d.Rotate(ctx, in.ID, runtime.Rotation{
				Generation: l.generation, SecretVersions: map[string]int64{"KEY": l.generation}, Keep: []string{"KEPT"}, Signal: syscall.SIGWINCH,
				Files: []runtime.File{{Name: "KEY", Data: fmt.Append(nil, l.generation)}, {Name: "NEW", Data: fmt.Append(nil, l.generation)}},
			})
			if err != nil {
				return err
			}
			return l.pass(ctx)
		case in.Phase == runtime.PhaseRunning:
			old = &list[i]
			l.watch(in.ID)
		case in.Phase == runtime.PhaseStandby:
			standby = &list[i]
		}
	}
	if old == nil && l.running.ID != "" && !l.stopped {
		l.Errorf("%v: the old one, %s, does not run any more: %+v", l.fault, l.running.ID, list)
	}
	if standby == nil {
		if _, err := l.d.EnsureImage(ctx, l.spec.Image); err != nil {
			return err
		}
		in, err := l.d.Prepare(ctx, l.spec)
		if err != nil {
			return err
		}
		standby = &in
	}
	launch := runtime.Launch{
		Generation: l.generation - 1, SecretVersions: map[string]int64{"KEY": l.generation - 1, "KEPT": 1}, Env: []string{fmt.Sprintf("GENERATION=%d", l.generation-1)},
		Files: []runtime.File{{Name: "KEY", Data: fmt.Append(nil, l.generation-1)}, {Name: "KEPT", Data: fmt.Append(nil, l.generation-1)}},
	}
	if old != nil {
		if err := l.d.Arm(ctx, standby.ID, launch); err != nil {
			return err
		}
		l.stopped = true
		if err := l.d.Stop(ctx, old.ID, syscall.SIGTERM, 10*time.Second); err != nil {
			return err
		}
		if !ctrdtest.Ended(old.PID) {
			l.Errorf("%v: %s lives after Stop", l.fault, old.ID)
		}
	}
	started, err := l.d.Start(ctx, standby.ID, launch)
	if err != nil {
		return l.neverStarts(standby.ID, err)
	}
	ctrdtest.AwaitReady(l, started.PID)
	return l.pass(ctx)
}

// neverStarts checks what Start's error promises.
func (l *life) neverStarts(id string, err error) error {
	list, lerr := l.d.List(context.Background(), l.spec.WorkspaceUID)
	for _, in := range list {
		if in.ID == id && (in.Phase == runtime.PhaseRunning || in.Phase == runtime.PhaseStandby) {
			l.Errorf("%v: after the failure of its start (%v) it is %+v", l.fault, err, in)
		}
	}
	return errors.Join(err, lerr)
}

// clean removes everything but one instance.
func (l *life) clean(ctx context.Context, list []runtime.Instance, but string) error {
	for _, in := range list {
		if in.ID == but {
			continue
		}
		if in.Phase == runtime.PhaseRunning {
			l.Errorf("%v: %s runs beside %s", l.fault, in.ID, but)
		}
		if err := l.d.Remove(ctx, in.ID); err != nil {
			return err
		}
	}
	return nil
}

// remove deletes the workspace.
func (l *life) remove() {
	l.Helper()
	l.stopped = true
	l.until("the deletion", func(ctx context.Context) error {
		list, err := l.d.List(ctx, l.spec.WorkspaceUID)
		if err != nil {
			return err
		}
		for _, in := range list {
			if err := l.d.Remove(ctx, in.ID); err != nil {
				return err
			}
		}
		return l.d.RemoveWorkspace(ctx, l.spec.WorkspaceID, l.spec.WorkspaceUID, false)
	})
	l.running = runtime.Instance{}
	if leaks := l.leaks(nil); len(leaks) != 0 {
		l.Errorf("%v: left of a workspace that was removed: %q", l.fault, leaks)
	}
}

// watch waits for the instance's end, as an actor does. The one that was watched
// before has ended.
func (l *life) watch(id string) {
	if l.watched == id {
		return
	}
	l.watching.Wait()
	var ctx context.Context
	ctx, l.unwatch = context.WithCancel(context.Background())
	l.watched = id
	d, timeout := l.d, 20*time.Second
	if l.fault.Action == fault.Hang {
		timeout = time.Second
	}
	begun := func() int { return l.in.Passed()[fault.Point{Step: "exit.wait", Moment: fault.Before}] }
	before := begun()
	l.watching.Go(func() {
		for ctx.Err() == nil {
			wctx, cancel := context.WithTimeout(ctx, timeout)
			err := survive(func() error {
				_, err := runtimetest.Wait(wctx, d, id)
				return err
			})
			cancel()
			if err == nil || errors.Is(err, runtime.ErrNotFound) {
				return
			}
			ctrdtest.Pause()
		}
	})
	ctrdtest.Eventually(l, "it waits", func() bool { return begun() > before })
}

// check holds that exactly the newest generation runs, and nothing else is there.
func (l *life) check(c faultCase, old runtime.Instance) {
	l.Helper()
	list, err := l.d.List(context.Background(), "")
	if err != nil || len(list) != 1 || list[0].ID != l.running.ID || list[0].Phase != runtime.PhaseRunning ||
		list[0].Generation != l.generation || list[0].SecretVersions["KEY"] != l.generation {
		l.Errorf("%v: List = %+v, %v, want %s to run", c, list, err, l.running.ID)
	}
	if old.ID != l.running.ID && !ctrdtest.Ended(old.PID) {
		l.Errorf("%v: the old process %d lives", c, old.PID)
	}
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", l.running.PID))
	if err != nil || !strings.Contains(string(environ), fmt.Sprintf("GENERATION=%d\x00", l.generation-1)) {
		l.Errorf("%v: environment %q, %v", c, environ, err)
	}
	for name, want := range map[string]int64{"KEY": l.generation, "NEW": l.generation, "KEPT": l.generation - 1} {
		file, err := os.ReadFile(fmt.Sprintf("/proc/%d/root%s/%s", l.running.PID, runtime.FilesDir, name))
		if err != nil || string(file) != fmt.Sprint(want) {
			l.Errorf("%v: the file %s holds %q, %v, want %d", c, name, file, err, want)
		}
	}
	if names, err := os.ReadDir(fmt.Sprintf("/proc/%d/root%s", l.running.PID, runtime.FilesDir)); err != nil || len(names) != 5 {
		l.Errorf("%v: beside the three files there is not what is in place and the link to it: %v, %v", c, names, err)
	}
	own := []string{"/w", "/uid-w", "/w.log", "/volumes/w/data"}
	leaks := l.leaks(func(leak string) bool {
		return strings.Contains(leak, l.running.ID) || slices.ContainsFunc(own, func(suffix string) bool { return strings.HasSuffix(leak, suffix) })
	})
	if len(leaks) != 0 {
		l.Errorf("%v: left beside what runs: %q", c, leaks)
	}
	l.checkOpen("")
}

// leaks returns what is there and not kept.
func (l *life) leaks(kept func(leak string) bool) (leaks []string) {
	l.Helper()
	for begin := time.Now(); ; ctrdtest.Pause() {
		leaks = l.e.Leaks(l, kept)
		// A lease whose end has failed or is late ends with the next one.
		lease := slices.ContainsFunc(leaks, func(leak string) bool { return strings.HasPrefix(leak, "lease ") })
		if !lease || time.Since(begin) > 20*time.Second {
			return leaks
		}
		if _, err := l.d.ImportFile(context.Background(), l.archive); err != nil {
			l.Errorf("%v: ImportFile: %v", l.fault, err)
		}
	}
}

// checkOpen wants no FIFO of the workspace's open whose name has the suffix. It is
// called soon: what is forgotten is closed by Go's garbage collector later.
func (l *life) checkOpen(suffix string) {
	l.Helper()
	for file := range openFiles() {
		if strings.HasPrefix(file, l.e.StateDir) && strings.Contains(file, "/io/") && strings.HasSuffix(file, suffix) {
			l.Errorf("%v: open: %s", l.fault, file)
		}
	}
}

// loseRecord is what an unmounted tmpfs does to an instance.
func (l *life) loseRecord(id string) {
	l.Helper()
	if err := os.Remove(filepath.Join(l.e.StateDir, "instances", l.e.InstanceUID, "uid-w", id, "record.json")); err != nil {
		l.Fatal(err)
	}
}

var numbers = regexp.MustCompile(`\[\d+\]`)

// openFiles counts this process's open files, those that have no name by kind.
func openFiles() map[string]int {
	files := make(map[string]int)
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			files[numbers.ReplaceAllString(target, "")]++
		}
	}
	return files
}

// goroutines returns the stacks of all.
func goroutines() string {
	var b bytes.Buffer
	_ = pprof.Lookup("goroutine").WriteTo(&b, 2)
	return b.String()
}
