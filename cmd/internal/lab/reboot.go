package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// KillContainerd ends the containerd that the daemon uses by SIGKILL and returns
// once it is gone. A private one is started again by the daemon, one of its own
// by the next Start.
func (d *Daemon) KillContainerd(ctx context.Context) error {
	if d.Own != nil {
		return d.Own.Kill()
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		pid, err := d.ContainerdPID() // two for a moment, while it forks
		if err == nil {
			return killAndWait(ctx, pid)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		}
	}
}

// killAndWait kills a process, which may be anybody's child, and waits until it
// is dead: gone, or waiting for its parent to notice.
func killAndWait(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 20)
		switch {
		case n > 0:
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("process %d: %w", pid, err)
		case ctx.Err() != nil:
			return fmt.Errorf("process %d does not end: %w", pid, ctx.Err())
		}
	}
}

// Reboot makes what a power failure leaves: no process, no mount, no cgroup, no
// state directory, but all that is on disk: database, images, volumes. Ids of
// workspaces begin with prefix.
func (s *Stage) Reboot(ctx context.Context, prefix string) error {
	d := s.Daemon
	if err := errors.Join(d.Kill(), d.KillContainerd(ctx)); err != nil {
		return err
	}
	sockets, err := d.shimSockets()
	if err != nil {
		return err
	}
	if err := killBelow(ctx, d.Base); err != nil {
		return err
	}
	points, err := MountsBelow(d.Base)
	if err != nil {
		return err
	}
	for _, point := range slices.Backward(points) {
		if err := unix.Unmount(point, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", point, err)
		}
	}
	for _, path := range append(sockets, d.StateDir(), filepath.Dir(d.Containerd())) {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	return removeCgroups(prefix)
}

// shimSockets are those that the shims of the daemon's containerd listen on.
func (d *Daemon) shimSockets() (paths []string, err error) {
	files, err := filepath.Glob(filepath.Join(filepath.Dir(d.Containerd()), "io.containerd.runtime.v2.task", "*", "*", "*"))
	for _, file := range files {
		switch filepath.Base(file) {
		case "address", "bootstrap.json": // of 1.x, of 2.x
			text, err := os.ReadFile(file)
			if err != nil {
				return nil, err
			}
			if _, path, ok := strings.Cut(string(text), "unix://"); ok {
				path, _, _ = strings.Cut(path, `"`)
				paths = append(paths, strings.TrimSpace(path))
			}
		}
	}
	return paths, err
}

// killBelow kills all processes that have to do with the directory, until there
// are none: one may just have started another. Those that only see its mounts,
// since they share this process's mount namespace, live on.
func killBelow(ctx context.Context, dir string) error {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	for {
		pids, err := ProcessesOf(dir)
		if err != nil {
			return err
		}
		killed := 0
		for _, pid := range pids {
			ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
			if err != nil || (ns == own && !hasArgument(pid, dir)) {
				continue // it has ended, or is a bystander
			}
			killed++
			if err := killAndWait(ctx, pid); err != nil {
				return err
			}
		}
		if killed == 0 {
			return nil
		}
	}
}

func hasArgument(pid int, dir string) bool {
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && strings.Contains(string(cmdline), dir)
}

// removeCgroups removes the cgroups of workspaces and their containers.
func removeCgroups(prefix string) error {
	var found []string
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() && strings.HasPrefix(e.Name(), prefix) {
			found = append(found, path)
		}
		return nil
	})
	for _, path := range slices.Backward(found) { // children first
		if rerr := os.Remove(path); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}
	return err
}
