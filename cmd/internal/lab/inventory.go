package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Inventory is what a daemon has on the machine.
type Inventory struct {
	Containers, Tasks, Snapshots, Leases int // in containerd; snapshots: active ones
	Shims                                int // processes
	Mounts                               int // below the base directory
	FIFOs                                int // below the base directory
	InstanceDirs                         int // of the driver
	Cgroups                              int // named after one of Containers
}

// Take counts. It asks containerd by way of ctr, which comes with it.
func (d *Daemon) Take(ctx context.Context) (inv Inventory, err error) {
	ids, err := d.ctr(ctx, "containers", "ls", "-q")
	if err != nil {
		return inv, err
	}
	inv.Containers = len(ids)
	for _, q := range []struct {
		count *int
		args  []string
		want  string
	}{
		{&inv.Tasks, []string{"tasks", "ls", "-q"}, ""},
		{&inv.Leases, []string{"leases", "ls", "-q"}, ""},
		{&inv.Snapshots, []string{"snapshots", "ls"}, "Active"},
	} {
		lines, err := d.ctr(ctx, q.args...)
		if err != nil {
			return inv, err
		}
		for _, line := range lines {
			if strings.Contains(line, q.want) {
				*q.count++
			}
		}
	}
	shims, err := d.Shims()
	if err != nil {
		return inv, err
	}
	inv.Shims = len(shims)
	mounts, err := MountsBelow(d.Base)
	if err != nil {
		return inv, err
	}
	inv.Mounts = len(mounts)
	fifos, err := fifosBelow(d.Base)
	if err != nil {
		return inv, err
	}
	inv.FIFOs = len(fifos)
	dirs, err := d.instanceFiles("record.json")
	if err != nil {
		return inv, err
	}
	inv.InstanceDirs = len(dirs)
	inv.Cgroups, err = cgroupsNamed(ids)
	return inv, err
}

// check says what is more or less than what so many running workspaces need.
// Mounts and FIFOs differ between versions of containerd, but are as many for
// each workspace.
func (inv Inventory) check(workspaces int) error {
	for _, c := range []struct {
		what  string
		count int
	}{
		{"containers", inv.Containers}, {"tasks", inv.Tasks}, {"active snapshots", inv.Snapshots}, {"shims", inv.Shims},
		{"instance directories", inv.InstanceDirs}, {"instances with a cgroup", inv.Cgroups},
	} {
		if c.count != workspaces {
			return fmt.Errorf("%d %s for %d workspaces: %+v", c.count, c.what, workspaces, inv)
		}
	}
	if inv.Leases != 0 {
		return fmt.Errorf("%d leases, want none: %+v", inv.Leases, inv)
	}
	return nil
}

// Settle takes inventories until one is right for so many running workspaces,
// since what is cleaned up after a restart takes its time, and returns it. like,
// if not nil, is an earlier one that it has to be equal to.
func (d *Daemon) Settle(ctx context.Context, workspaces int, like *Inventory) (Inventory, error) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		inv, err := d.Take(ctx)
		if err == nil {
			err = inv.check(workspaces)
		}
		if err == nil && like != nil && inv != *like {
			fifos, _ := fifosBelow(d.Base)   // for people
			mounts, _ := MountsBelow(d.Base) // likewise
			err = fmt.Errorf("inventory %+v, was %+v; FIFOs %v, mounts %v", inv, *like, fifos, mounts)
		}
		if err == nil {
			return inv, nil
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return inv, fmt.Errorf("does not settle: %w", last)
		}
	}
}

// ContainerdPID is the process id of the private containerd.
func (d *Daemon) ContainerdPID() (int, error) {
	pids, err := processes(func(_ int, args []string) bool {
		return len(args) > 2 && args[1] == "--config" && filepath.Dir(args[2]) == filepath.Dir(d.Containerd())
	})
	if err == nil && len(pids) != 1 {
		err = fmt.Errorf("%d private containerds run", len(pids))
	}
	if err != nil {
		return 0, err
	}
	return pids[0], nil
}

func (d *Daemon) ctr(ctx context.Context, args ...string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ctr", append([]string{"--address", d.Containerd(), "--namespace", "workspaced"}, args...)...)
	var errOut strings.Builder
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, errOut.String())
	}
	return slices.DeleteFunc(strings.Split(string(out), "\n"), func(s string) bool { return s == "" }), nil
}

// Shims are the pids of the shims of the private containerd.
func (d *Daemon) Shims() ([]int, error) {
	return processes(func(_ int, args []string) bool {
		i := slices.Index(args, "-address")
		return i > 0 && i+1 < len(args) && args[i+1] == d.Containerd()
	})
}

// ProcessesOf are the pids of processes that have the directory on their
// command line, as shims do, or among their mounts, as containers do.
func ProcessesOf(dir string) ([]int, error) {
	return processes(func(pid int, args []string) bool {
		if strings.Contains(strings.Join(args, " "), dir) {
			return true
		}
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
		return err == nil && strings.Contains(string(mounts), dir+"/")
	})
}

func processes(match func(pid int, args []string) bool) (pids []int, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil {
			continue // it ended meanwhile
		}
		if match(pid, strings.Split(string(cmdline), "\x00")) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// MountsBelow are the mount points below a directory.
func MountsBelow(dir string) (points []string, err error) {
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, err
	}
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			points = append(points, f[4])
		}
	}
	return points, nil
}

// InstanceFile finds a file in the driver's directory of a container.
func (d *Daemon) InstanceFile(id, name string) (string, error) {
	paths, err := d.instanceFiles(name)
	for _, path := range paths {
		if filepath.Base(filepath.Dir(path)) == id {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s of container %s: %w", name, id, errors.Join(err, fs.ErrNotExist))
}

// instanceFiles finds the files of this name in the driver's directories, one a
// container.
func (d *Daemon) instanceFiles(name string) (paths []string, err error) {
	err = filepath.WalkDir(filepath.Join(d.StateDir(), "instances"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Name() == name {
			paths = append(paths, path)
		}
		return nil // what vanishes while we look is not there
	})
	return paths, err
}

func fifosBelow(dir string) (paths []string, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type() == fs.ModeNamedPipe {
			paths = append(paths, path)
		}
		return nil // what vanishes while we look is not there
	})
	return paths, err
}

// cgroupsNamed counts the instances that have a cgroup, in whichever hierarchy.
func cgroupsNamed(ids []string) (n int, err error) {
	found := map[string]bool{}
	err = filepath.WalkDir("/sys/fs/cgroup", func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() && slices.Contains(ids, filepath.Base(path)) {
			found[filepath.Base(path)] = true
		}
		return nil
	})
	return len(found), err
}

// instances are the ids of the containers that the daemon says it has started.
func (d *Daemon) instances() (ids []string, err error) {
	log, err := os.ReadFile(d.LogFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, m := range regexp.MustCompile(` instance=(\S+)`).FindAllSubmatch(log, -1) {
		ids = append(ids, string(m[1]))
	}
	return ids, err
}

// Leftovers says what is still there of a daemon that was purged; the base
// directory may be gone.
func Leftovers(base string) (left []string, err error) {
	if _, err := os.Lstat(base); err == nil {
		mounts, err := MountsBelow(base)
		if err != nil {
			return nil, err
		}
		for _, m := range mounts {
			left = append(left, "mount "+m)
		}
		err = filepath.WalkDir(base, func(path string, _ fs.DirEntry, err error) error {
			if path != base {
				left = append(left, "file "+path)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	pids, err := ProcessesOf(base)
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) // gone: an empty name
		left = append(left, fmt.Sprintf("process %d %s", pid, strings.ReplaceAll(string(cmdline), "\x00", " ")))
	}
	return left, nil
}
