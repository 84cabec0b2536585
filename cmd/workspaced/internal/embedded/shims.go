package embedded

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// sweepShims ends the shims that containerd, which was started at the time
// since, has lost, with all that they hold:
//
//   - It could not tell the shim to end after its task was deleted, or it found
//     it broken. Then the shim's bundle, which is its working directory, is gone.
//   - It ended while the shim created or deleted a task, and its successor knows
//     the shim but no task. Then the shim is older than containerd. hasTask says
//     whether there is a task; nil leaves these alone.
//
// Nobody else would ever end them. Shims of other containerds are not looked at.
func sweepShims(cfg Config, since uint64, hasTask func(namespace, id string) (bool, error)) error {
	all, err := readProcesses()
	if err != nil {
		return err
	}
	var errs []error
	for pid, p := range all {
		if !p.isShim(cfg.Address()) {
			continue
		}
		lost := strings.HasSuffix(p.cwd, " (deleted)")
		if !lost && hasTask != nil && p.start < since {
			has, err := hasTask(p.arg("-namespace"), p.arg("-id"))
			if err != nil {
				errs = append(errs, fmt.Errorf("task %s: %w", p.arg("-id"), err))
			}
			lost = err == nil && !has
		}
		if !lost {
			continue
		}
		cfg.Logger.Warn("ending a shim that containerd has lost", "pid", pid, "bundle", p.cwd)
		errs = append(errs, endShim(all, pid))
	}
	return errors.Join(errs...)
}

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
	cwd    string // read for shims only
}

func (p proc) isShim(address string) bool { return p.arg("-address") == address }

// arg returns the argument after a flag.
func (p proc) arg(flag string) string {
	if i := slices.Index(p.args, flag); i >= 0 && i+1 < len(p.args) {
		return p.args[i+1]
	}
	return ""
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
	if slices.Contains(p.args, "-address") {
		if p.cwd, err = os.Readlink(filepath.Join(dir, "cwd")); err != nil {
			return proc{}, err
		}
	}
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
