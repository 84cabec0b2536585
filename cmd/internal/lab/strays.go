package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// World is what there is meant to be.
type World struct {
	// Prefix is what the ids of workspaces begin with, and those of no other stage
	// on this machine: cgroups know no other owner.
	Prefix string
	// Workspaces are the ids of all there are.
	Workspaces []string
	// Running are the containers that are meant to run, by their id.
	Running map[string]Container
}

// Container is one that is meant to run.
type Container struct {
	Workspace string
	PID       int
}

// instanceSuffix ends the names of containers, behind their workspace's id.
var instanceSuffix = regexp.MustCompile(`-[0-9a-f]{12}$`)

// Strays says what there is of the daemon's beside what is meant to be, and what
// is missing of that.
func (d *Daemon) Strays(ctx context.Context, world World) (strays []string, err error) {
	look := looker{d: d, World: world}
	for _, part := range []func(context.Context) error{
		look.containers, look.tasks, look.snapshots, look.leases, look.shims,
		look.mounts, look.files, look.handles, look.namespaces, look.cgroups,
	} {
		if err := part(ctx); err != nil {
			return nil, err
		}
	}
	return look.found, nil
}

// WaitNoStrays looks until there are none: what is cleaned up takes its time.
func (d *Daemon) WaitNoStrays(ctx context.Context, world World) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var last error // of a look that the end of ctx did not cut short
	for {
		strays, err := d.Strays(ctx, world)
		if err == nil && len(strays) == 0 {
			return nil
		}
		if err == nil {
			err = errors.New(strings.Join(strays, "; "))
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%d containers are meant to run: %w", len(world.Running), last)
		}
	}
}

// looker looks at one place after the other.
type looker struct {
	World
	d     *Daemon
	found []string
}

func (l *looker) stray(format string, args ...any) {
	l.found = append(l.found, fmt.Sprintf(format, args...))
}

// exactly compares what there is, a name for each, with what is meant to run.
func (l *looker) exactly(what string, names []string) {
	seen := map[string]bool{}
	for _, name := range names {
		if _, ok := l.Running[name]; !ok {
			l.stray("%s %s is left", what, name)
		} else if seen[name] {
			l.stray("%s %s is there twice", what, name)
		}
		seen[name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(l.Running)) {
		if !seen[name] {
			l.stray("%s %s is missing", what, name)
		}
	}
}

func (l *looker) containers(ctx context.Context) error {
	ids, err := l.d.ctr(ctx, "containers", "ls", "-q")
	l.exactly("container", ids)
	return err
}

func (l *looker) tasks(ctx context.Context) error {
	lines, err := l.d.ctr(ctx, "tasks", "ls")
	if err != nil {
		return err
	}
	var ids []string
	for _, line := range lines[min(1, len(lines)):] { // after the titles
		f := strings.Fields(line) // id, pid, status
		if len(f) != 3 {
			return fmt.Errorf("ctr tasks ls: %q", line)
		}
		ids = append(ids, f[0])
		if c, ok := l.Running[f[0]]; ok && (f[1] != strconv.Itoa(c.PID) || f[2] != "RUNNING") {
			l.stray("task %s, want pid %d and RUNNING", strings.Join(f, " "), c.PID)
		}
	}
	l.exactly("task", ids)
	return nil
}

func (l *looker) snapshots(ctx context.Context) error {
	lines, err := l.d.ctr(ctx, "snapshots", "ls")
	if err != nil {
		return err
	}
	var ids []string
	for _, line := range lines[min(1, len(lines)):] {
		if f := strings.Fields(line); f[len(f)-1] != "Committed" { // which belong to images
			ids = append(ids, f[0])
		}
	}
	l.exactly("snapshot", ids)
	return nil
}

func (l *looker) leases(ctx context.Context) error {
	ids, err := l.d.ctr(ctx, "leases", "ls", "-q")
	for _, id := range ids {
		l.stray("lease %s is left", id)
	}
	return err
}

func (l *looker) shims(context.Context) error {
	pids, err := l.d.Shims()
	if err != nil {
		return err
	}
	var ids []string
	for _, pid := range pids {
		ids = append(ids, flagOf(pid, "-id"))
	}
	l.exactly("shim", ids)
	return nil
}

// flagOf returns what follows a flag on a process's command line.
func flagOf(pid int, flag string) string {
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return "" // it has ended
	}
	args := strings.Split(string(cmdline), "\x00")
	if i := slices.Index(args, flag); i >= 0 && i+1 < len(args) {
		return args[i+1]
	}
	return ""
}

// mounts: the root file system of each container, and the tmpfs of the instances.
func (l *looker) mounts(context.Context) error {
	points, err := MountsBelow(l.d.Base)
	if err != nil {
		return err
	}
	var ids []string
	for _, point := range points {
		if point == filepath.Join(l.d.StateDir(), "instances") {
			continue
		}
		if filepath.Base(point) != "rootfs" {
			l.stray("mount %s is left", point)
			continue
		}
		ids = append(ids, filepath.Base(filepath.Dir(point)))
	}
	l.exactly("root file system", ids)
	return nil
}

// files: no FIFO, and nothing that is named after a container or a workspace
// that is gone.
func (l *looker) files(context.Context) error {
	for _, dir := range []string{l.d.StateDir(), l.d.DataDir(), filepath.Dir(l.d.Containerd())} {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return nil // what vanishes while we look is not there
			}
			if e.IsDir() && (e.Name() == "rootfs" || path == filepath.Join(l.d.DataDir(), "containerd")) {
				return fs.SkipDir // a container's own, and what containerd keeps over a reboot
			}
			_, runs := l.Running[e.Name()]
			workspace, _, _ := strings.Cut(e.Name(), ".")
			switch {
			case l.isInstance(e.Name()) && !runs, l.gone(workspace):
				l.stray("%v %s is left", e.Type(), path)
			case e.Type() == fs.ModeNamedPipe && !l.isShimLog(path):
				l.stray("FIFO %s is left", path)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// handles: a log is open in its container's shim and nowhere else, a FIFO or an
// instance's file nowhere, and the daemon holds on to one process for each
// container.
func (l *looker) handles(context.Context) error {
	shims := map[int]string{} // the workspace
	pids, err := l.d.Shims()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		shims[pid] = l.Running[flagOf(pid, "-id")].Workspace
	}
	all, err := processes(func(int, []string) bool { return true })
	if err != nil {
		return err
	}
	pidfds := 0
	for _, pid := range append(all, os.Getpid()) {
		links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			return err
		}
		for _, link := range links {
			target, err := os.Readlink(link)
			if err != nil {
				continue // closed meanwhile
			}
			if pid == l.d.PID() && target == "anon_inode:[pidfd]" {
				pidfds++
			}
			if strings.HasPrefix(target, filepath.Join(l.d.StateDir(), "instances")+"/") {
				l.stray("process %d holds %s", pid, target)
			}
			log, ok := strings.CutPrefix(target, filepath.Join(l.d.DataDir(), "logs")+"/")
			if ok && (shims[pid] == "" || log != shims[pid]+".log") {
				l.stray("process %d, shim of workspace %q, holds the log %s", pid, shims[pid], log)
			}
		}
	}
	want := len(l.Running)
	if l.d.Own == nil {
		want++ // containerd, its child
	}
	if l.d.PID() != 0 && pidfds != want {
		l.stray("the daemon holds %d processes, want %d", pidfds, want)
	}
	return nil
}

// namespaces: containers use the host's network.
func (l *looker) namespaces(context.Context) error {
	entries, err := os.ReadDir("/run/netns")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		l.stray("network namespace %s is left", e.Name())
	}
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return err
	}
	pids, err := ProcessesOf(l.d.Base)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid)); err == nil && ns != own {
			l.stray("process %d is in the network namespace %s", pid, ns)
		}
	}
	return nil
}

// isShimLog tells the FIFO that containerd reads a shim's log from.
func (l *looker) isShimLog(path string) bool {
	_, runs := l.Running[filepath.Base(filepath.Dir(path))]
	return runs && filepath.Base(path) == "log"
}

// isInstance tells whether this is the name of a container of the daemon's.
func (l *looker) isInstance(name string) bool {
	return strings.HasPrefix(name, l.Prefix) && instanceSuffix.MatchString(name)
}

// gone tells whether this is the name of a workspace that is no more.
func (l *looker) gone(name string) bool {
	return strings.HasPrefix(name, l.Prefix) && !l.isInstance(name) && !slices.Contains(l.Workspaces, name)
}

func (l *looker) cgroups(context.Context) error {
	seen := map[string]bool{}
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, e fs.DirEntry, err error) error {
		name := filepath.Base(path)
		if err != nil || !e.IsDir() || !strings.HasPrefix(name, l.Prefix) {
			return nil
		}
		if l.isInstance(name) {
			seen[name] = true
		} else if l.gone(name) {
			l.stray("cgroup %s is left", path)
		}
		return nil
	})
	l.exactly("cgroup", slices.Sorted(maps.Keys(seen)))
	return err
}
