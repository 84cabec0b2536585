package ctrdtest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/moby/sys/mountinfo"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd"
)

// Env is what a daemon has of its own: a namespace in a containerd, and
// directories. They outlive drivers, as they outlive a daemon's process.
type Env struct {
	Containerd        *Containerd
	Namespace         string
	StateDir, DataDir string
	InitPath          string
	InstanceUID       string

	drivers []*ctrd.Driver
}

// NewEnv returns an empty one. What is left in it when the test ends is removed.
func NewEnv(tb testing.TB, c *Containerd) *Env {
	tb.Helper()
	var random [4]byte
	rand.Read(random[:])
	id := hex.EncodeToString(random[:])
	dir := filepath.Join(c.Dir, "env-"+id)
	e := &Env{
		Containerd:  c,
		Namespace:   "test-" + id,
		StateDir:    filepath.Join(dir, "state"),
		DataDir:     filepath.Join(dir, "data"),
		InitPath:    InitPath(tb),
		InstanceUID: "instance-" + id,
	}
	tb.Cleanup(func() {
		e.purge(tb)
		for _, d := range e.drivers {
			d.Close()
		}
		UnmountBelow(tb, dir)
		if err := os.RemoveAll(dir); err != nil {
			tb.Errorf("files of the test's daemon: %v", err)
		}
	})
	return e
}

// purge removes what a test that failed has left.
func (e *Env) purge(tb testing.TB) {
	tb.Helper()
	select {
	case <-e.Containerd.exited:
		return // nobody to ask; Containerd's own end takes the rest
	default:
	}
	d, err := ctrd.New(context.Background(), e.Config())
	if err != nil {
		tb.Errorf("cleaning up: %v", err)
		return
	}
	defer d.Close()
	RemoveAll(tb, d)
	for _, path := range e.cgroups() {
		_ = os.Remove(path) // of workspaces that were not removed
	}
}

// Config is the driver's. It allows specs everything.
func (e *Env) Config() ctrd.Config {
	return ctrd.Config{
		Address:     e.Containerd.Address,
		Namespace:   e.Namespace,
		InstanceUID: e.InstanceUID,
		StateDir:    e.StateDir,
		DataDir:     e.DataDir,
		InitPath:    e.InitPath,
		Policy:      runtime.Policy{AllowPrivileged: true, HostPaths: []string{"/"}},
	}
}

// NewDriver returns a driver, which is closed when the test that NewEnv was
// called for ends, or before.
func (e *Env) NewDriver(tb testing.TB, edit func(*ctrd.Config)) *ctrd.Driver {
	tb.Helper()
	cfg := e.Config()
	if edit != nil {
		edit(&cfg)
	}
	d, err := ctrd.New(context.Background(), cfg)
	if err != nil {
		tb.Fatalf("driver: %v\n%s", err, e.Containerd.Log())
	}
	e.drivers = append(e.drivers, d)
	return d
}

// Reboot is what a reboot of the machine does to the Env: its state directory is
// gone, and every cgroup. It is called in Containerd.Reboot.
func (e *Env) Reboot(tb testing.TB) {
	tb.Helper()
	UnmountBelow(tb, e.StateDir)
	if err := os.RemoveAll(e.StateDir); err != nil {
		tb.Fatal(err)
	}
	for _, path := range e.cgroups() {
		Eventually(tb, "the cgroup is empty", func() bool { return os.Remove(path) == nil || !exists(path) })
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// AddForeign makes a container beside those of the Env's drivers: another
// daemon's, or with an empty uid nobody's.
func (e *Env) AddForeign(tb testing.TB, instanceUID string) (remove func()) {
	tb.Helper()
	ctx := namespaces.WithNamespace(context.Background(), e.Namespace)
	service := e.Containerd.Client(tb, e.Namespace).ContainerService()
	c := containers.Container{
		ID:      "foreign-" + rand.Text(),
		Labels:  map[string]string{"workspaced/workspace-uid": "uid-a"},
		Runtime: containers.RuntimeInfo{Name: "io.containerd.runc.v2"},
		Spec:    &anypb.Any{},
	}
	if instanceUID != "" {
		c.Labels["workspaced/instance-uid"] = instanceUID
	}
	if _, err := service.Create(ctx, c); err != nil {
		tb.Fatal(err)
	}
	return func() {
		if err := service.Delete(ctx, c.ID); err != nil {
			tb.Error(err)
		}
	}
}

// RemoveAll removes every instance that the driver knows.
func RemoveAll(tb testing.TB, d *ctrd.Driver) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	list, err := d.List(ctx, "")
	if err != nil {
		tb.Errorf("List: %v", err)
	}
	for _, in := range list {
		if err := d.Remove(ctx, in.ID); err != nil {
			tb.Errorf("Remove: %v", err)
		}
	}
}

// Leaks describes everything that is there of instances and workspaces, one per
// string: containers, tasks, snapshots, leases, shims, mounts, FIFOs and other
// files, cgroups. An Env in which everything was removed has none. What is kept,
// which may be nil, is meant to be there.
func (e *Env) Leaks(tb testing.TB, kept func(leak string) bool) []string {
	tb.Helper()
	if kept == nil {
		kept = func(string) bool { return false }
	}
	// A shim ends a moment after its task was deleted.
	var leaks []string
	for range 500 {
		if leaks = slices.DeleteFunc(e.shims(), kept); len(leaks) == 0 {
			break
		}
		Pause()
	}
	leaks = append(leaks, e.remoteLeaks(tb)...)
	return slices.DeleteFunc(append(leaks, e.localLeaks(tb)...), kept)
}

// remoteLeaks are those that containerd is asked for.
func (e *Env) remoteLeaks(tb testing.TB) []string {
	tb.Helper()
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), e.Namespace), patience)
	defer cancel()
	cl := e.Containerd.client(tb)
	defer cl.Close()
	var leaks []string
	add := func(what, which string) { leaks = append(leaks, what+" "+which) }

	containers, err := cl.ContainerService().List(ctx)
	if err != nil {
		tb.Fatal(err)
	}
	for _, c := range containers {
		add("container", c.ID)
	}
	list, err := cl.TaskService().List(ctx, &tasks.ListTasksRequest{})
	if err != nil {
		tb.Fatal(err)
	}
	for _, t := range list.Tasks {
		add("task", t.ID)
	}
	err = cl.SnapshotService("overlayfs").Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Kind != snapshots.KindCommitted {
			add("snapshot", i.Name)
		}
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	leases, err := cl.LeasesService().List(ctx)
	if err != nil {
		tb.Fatal(err)
	}
	for _, l := range leases {
		add("lease", l.ID)
	}
	return leaks
}

// localLeaks are those that containerd is not asked for, but for shims.
func (e *Env) localLeaks(tb testing.TB) []string {
	tb.Helper()
	var leaks []string
	instances := filepath.Join(e.StateDir, "instances")
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		tb.Fatal(err)
	}
	for _, m := range mounts {
		if strings.Contains(m.Mountpoint, "/"+e.Namespace+"/") || (strings.HasPrefix(m.Mountpoint, e.StateDir) && m.Mountpoint != instances) {
			leaks = append(leaks, "mount "+m.Mountpoint)
		}
	}
	for _, dir := range []string{e.StateDir, e.DataDir} {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			switch {
			case os.IsNotExist(err):
				return nil
			case err != nil:
				return err
			case path == dir, path == instances, path == filepath.Join(instances, e.InstanceUID), path == filepath.Join(e.DataDir, "volumes"), path == filepath.Join(e.DataDir, "logs"),
				path == filepath.Join(e.StateDir, "runc"), path == filepath.Join(e.StateDir, "runc", e.Namespace),
				strings.HasPrefix(path, filepath.Join(instances, ".init-")):
				return nil
			}
			leaks = append(leaks, fmt.Sprintf("%v %s", entry.Type(), path))
			return nil
		})
		if err != nil {
			tb.Fatal(err)
		}
	}
	for _, path := range e.cgroups() {
		if filepath.Base(path) != e.Namespace {
			leaks = append(leaks, "cgroup "+path)
		}
	}
	return leaks
}

func (e *Env) shims() []string {
	var shims []string
	for _, pid := range e.Containerd.Shims() {
		args := commandLine(pid)
		for i, arg := range args {
			if arg == "-namespace" && i+1 < len(args) && args[i+1] == e.Namespace {
				shims = append(shims, fmt.Sprintf("shim %d %q", pid, args))
			}
		}
	}
	return shims
}

// cgroups returns those of the namespace, children first.
func (e *Env) cgroups() []string {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil
	}
	var paths []string
	for _, m := range mounts {
		var below []string
		_ = filepath.WalkDir(filepath.Join(m.Mountpoint, e.Namespace), func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				below = append([]string{path}, below...)
			}
			return nil
		})
		paths = append(paths, below...)
	}
	return paths
}
