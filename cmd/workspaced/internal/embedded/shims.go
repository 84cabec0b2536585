package embedded

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// endShim kills a shim and all below it.
func endShim(all map[int]proc, pid int) error {
	var errs []error
	for _, victim := range append(descendants(all, pid), pid) {
		if err := killProcess(victim, all[victim]); err != nil {
			errs = append(errs, fmt.Errorf("pid %d: %w", victim, err))
		}
	}
	return errors.Join(errs...)
}

// EndAll kills the private containerd, all its shims and all containers, whose
// ever they are, and says how many shims it were. The caller holds the lock of
// cfg's state.
func EndAll(ctx context.Context, cfg Config) (shims int, err error) {
	cfg = withDefaults(cfg)
	if err := StopStray(ctx, cfg); err != nil {
		return 0, err
	}
	seen := map[int]bool{}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		all, err := readProcesses()
		if err != nil {
			return len(seen), err
		}
		var errs []error
		left := 0
		for pid, p := range all {
			if p.isShim(cfg.Address()) {
				left++
				seen[pid] = true
				errs = append(errs, endShim(all, pid))
			}
		}
		if err := errors.Join(errs...); err != nil || left == 0 {
			return len(seen), err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return len(seen), fmt.Errorf("%d shims do not end: %w", left, ctx.Err())
		}
	}
}

// proc is a process as /proc shows it.
type proc struct {
	parent int
	start  uint64 // clock ticks since boot: with the pid, its identity
	args   []string
}

// removeBrokenBundles removes the directories of tasks whose creation was broken
// off so early that containerd's own clean-up, at each of its starts, fails: the
// shim had not yet noted its runtime. And their working directories, which nobody
// else removes when the state has gone with a restart of the machine. No
// containerd of cfg may run.
func removeBrokenBundles(cfg Config) error {
	bundles, err := filepath.Glob(filepath.Join(cfg.State, bundlesDir, "*", "*"))
	if err != nil {
		return err
	}
	work, err := filepath.Glob(filepath.Join(cfg.Root, bundlesDir, "*", "*"))
	if err != nil || len(bundles)+len(work) == 0 {
		return err
	}
	all, err := readProcesses()
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range work {
		bundle := filepath.Join(cfg.State, bundlesDir, filepath.Base(filepath.Dir(dir)), filepath.Base(dir))
		if _, err := os.Stat(bundle); errors.Is(err, fs.ErrNotExist) && !hasShim(all, cfg, bundle) {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	for _, bundle := range bundles {
		if _, err := os.Stat(filepath.Join(bundle, "runtime")); !errors.Is(err, fs.ErrNotExist) || hasShim(all, cfg, bundle) {
			continue
		}
		// Nothing is mounted there so early; where something is, this fails.
		if err := os.RemoveAll(bundle); err != nil {
			errs = append(errs, err)
			continue
		}
		cfg.Logger.Info("removed a broken bundle of containerd", "bundle", bundle)
	}
	return errors.Join(errs...)
}

// bundlesDir is where containerd keeps what belongs to tasks, in its state and in
// its root.
const bundlesDir = "io.containerd.runtime.v2.task"

func hasShim(all map[int]proc, cfg Config, bundle string) bool {
	for _, p := range all {
		if p.isShim(cfg.Address()) && slices.Contains(p.args, filepath.Base(bundle)) {
			return true
		}
	}
	return false
}

func (p proc) isShim(address string) bool {
	i := slices.Index(p.args, "-address")
	return i >= 0 && i+1 < len(p.args) && p.args[i+1] == address
}

func readProcesses() (map[int]proc, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	all := make(map[int]proc)
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			if p, err := readProcess(pid); err == nil { // else it has ended
				all[pid] = p
			}
		}
	}
	return all, nil
}

func readProcess(pid int) (proc, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return proc{}, err
	}
	// The name, in parentheses, may contain anything.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 {
		return proc{}, errors.New("short stat")
	}
	var p proc
	if p.parent, err = strconv.Atoi(fields[1]); err != nil {
		return proc{}, err
	}
	if p.start, err = strconv.ParseUint(fields[19], 10, 64); err != nil {
		return proc{}, err
	}
	cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return proc{}, err
	}
	p.args = strings.Split(string(cmdline), "\x00")
	return p, nil
}

// descendants are the processes below pid.
func descendants(all map[int]proc, pid int) (below []int) {
	for child, p := range all {
		if p.parent == pid {
			below = append(append(below, child), descendants(all, child)...)
		}
	}
	return below
}

// killProcess kills the process unless its pid belongs to another one by now.
func killProcess(pid int, was proc) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if now, err := readProcess(pid); err != nil || now.start != was.start {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}
