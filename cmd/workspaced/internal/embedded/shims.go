package embedded

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// sweepShims ends the shims that containerd has lost, with all that they hold:
// it ended between a shim's start and its own note of it, or it could not tell
// the shim to end after its task was deleted. containerd has then removed the
// shim's bundle, which is its working directory, and nobody can reach it any
// more. Shims of other containerds are not looked at.
func sweepShims(cfg Config) error {
	all, err := readProcesses()
	if err != nil {
		return err
	}
	var errs []error
	for pid, p := range all {
		if !isLost(p, cfg.Address()) {
			continue
		}
		cfg.Logger.Warn("ending a shim that containerd has lost", "pid", pid, "bundle", p.cwd)
		for _, victim := range append(descendants(all, pid), pid) {
			if err := killProcess(victim, all[victim]); err != nil {
				errs = append(errs, fmt.Errorf("pid %d: %w", victim, err))
			}
		}
	}
	return errors.Join(errs...)
}

// proc is a process as /proc shows it.
type proc struct {
	parent int
	start  string // clock ticks since boot: with the pid, its identity
	args   []string
	cwd    string // read for shims only
}

func isLost(p proc, address string) bool {
	i := slices.Index(p.args, "-address")
	return i > 0 && i+1 < len(p.args) && p.args[i+1] == address && strings.HasSuffix(p.cwd, " (deleted)")
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
	p := proc{start: fields[19]}
	if p.parent, err = strconv.Atoi(fields[1]); err != nil {
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
