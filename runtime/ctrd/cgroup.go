package ctrd

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// removeCgroup removes an instance's cgroup from every hierarchy, and kills what
// is still in it. The OCI runtime has removed those of containers that it
// deleted; this is for one that was itself killed in the middle.
func (d *Driver) removeCgroup(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, d.deadlines.kill)
	defer cancel()
	for _, point := range d.cgroups {
		dir := filepath.Join(point, path)
		for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
			err := unix.Rmdir(dir)
			if err == nil || errors.Is(err, unix.ENOENT) {
				break
			}
			if err := killCgroup(dir); err != nil {
				return err
			}
			select {
			case <-ctx.Done():
				return &os.PathError{Op: "rmdir", Path: dir, Err: errors.Join(err, ctx.Err())}
			case <-time.After(wait):
			}
		}
	}
	return nil
}

// killCgroup kills the processes of a cgroup and removes those below it.
func killCgroup(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
		return err
	}
	for _, field := range strings.Fields(string(b)) {
		pid, err := strconv.Atoi(field)
		if err != nil || pid <= 0 {
			continue // of a pid namespace that is not ours
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("process %d of cgroup %s: %w", pid, dir, err)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil // it went away
	}
	for _, entry := range entries {
		if entry.IsDir() {
			below := filepath.Join(dir, entry.Name())
			if err := killCgroup(below); err != nil {
				return err
			}
			_ = unix.Rmdir(below) // the next round finds it
		}
	}
	return nil
}

// removeEmptyCgroup removes a cgroup of cgroups where there are none in it: a
// workspace's, or that of all.
func (d *Driver) removeEmptyCgroup(path string) {
	for _, point := range d.cgroups {
		_ = unix.Rmdir(filepath.Join(point, path)) // there is none, or it is in use
	}
}

// oomKills returns how many processes of the cgroup the kernel has killed for
// want of memory: memory.events of v2, memory.oom_control of v1.
func (d *Driver) oomKills(path string) int {
	for _, point := range d.cgroups {
		for _, file := range []string{"memory.events", "memory.oom_control"} {
			b, err := os.ReadFile(filepath.Join(point, path, file))
			if err != nil {
				continue
			}
			for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
				if v, ok := strings.CutPrefix(lines.Text(), "oom_kill "); ok {
					if n, err := strconv.Atoi(strings.TrimSpace(v)); err == nil {
						return n
					}
				}
			}
		}
	}
	return 0
}
