package rows

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/cmd/internal/lab"
	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

// aroundFunc does a step of the store, an actor or the driver, as their Around:
// tests slow one down in it.
type aroundFunc func(ctx context.Context, step string, do func(context.Context) error) error

// Where a machine's containers have what.
const (
	probeImage   = "workspaced.local/probe:1"
	probeProgram = "bench-probe"
	probeUser    = "1234:1234"
	probeMount   = "/probe" // of the directory with the records
)

const (
	settleTimeout = 20 * time.Second
	closeTimeout  = time.Minute
)

// machine is the daemon's stack in this process, without its RPCs: store, actors
// and the containerd driver, on a containerd of its own, the machine's version.
// Its workspaces run the probe.
type machine struct {
	dir        string
	namespace  string // containerd's
	containerd *lab.Containerd
	driver     *ctrd.Driver
	store      *store.Store
	log        *os.File

	actorConfig workspace.Config
	supervisor  *workspace.Supervisor
	endActors   context.CancelFunc
	actors      chan error // gets the supervisor's end; nil before run

	mu sync.Mutex
	// changed is closed, and made anew, whenever a record changes or a container
	// is made or removed.
	changed    chan struct{}
	containers map[string]string // the workspace's id by the instance's
}

// startMachine starts one; the caller closes it. Around may be nil.
func startMachine(ctx context.Context, env *Env, around aroundFunc) (_ *machine, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("must run as root: containers, mounts and cgroups need it")
	}
	probe, err := env.program(probeProgram)
	if err != nil {
		return nil, err
	}
	initPath, err := env.program("workspace-init")
	if err != nil {
		return nil, err
	}
	dir, _, err := env.temp("m")
	if err != nil {
		return nil, err
	}
	m := &machine{
		dir: dir, namespace: "bench-" + filepath.Base(dir),
		containerd: &lab.Containerd{Dir: filepath.Join(dir, "ctrd")},
		changed:    make(chan struct{}), containers: make(map[string]string),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close(ctx))
		}
	}()
	if err := m.mountProbes(); err != nil {
		return nil, err
	}
	if err := m.containerd.Start(ctx); err != nil {
		return nil, err
	}
	if err := m.open(ctx, initPath, around); err != nil {
		return nil, err
	}
	tar := filepath.Join(dir, "probe.tar")
	if err := writeProbeImage(probe, tar); err != nil {
		return nil, err
	}
	if _, err := m.driver.ImportFile(ctx, tar); err != nil {
		return nil, err
	}
	m.run(ctx)
	return m, nil
}

// probes is the directory that workspaces have at probeMount, in memory: a disk's
// writes must not be in a downtime.
func (m *machine) probes() string { return filepath.Join(m.dir, "probes") }

func (m *machine) mountProbes() error {
	if err := os.Mkdir(m.probes(), 0o755); err != nil {
		return err
	}
	if err := unix.Mount("bench", m.probes(), "tmpfs", unix.MS_NODEV|unix.MS_NOSUID, "mode=0777"); err != nil {
		return fmt.Errorf("tmpfs at %s: %w", m.probes(), err)
	}
	return nil
}

// open opens store and driver, and makes the supervisor.
func (m *machine) open(ctx context.Context, initPath string, around aroundFunc) error {
	kek, err := seal.LoadOrCreate(filepath.Join(m.dir, "key"))
	if err != nil {
		return err
	}
	if m.log, err = os.Create(filepath.Join(m.dir, "log")); err != nil {
		return err
	}
	logger := slog.New(slog.NewTextHandler(m.log, nil))
	m.store, err = store.Open(store.Config{
		Path: filepath.Join(m.dir, "db"), KEK: kek, OnCommit: m.onCommit, Logger: logger, Around: around,
	})
	if err != nil {
		return err
	}
	m.driver, err = ctrd.New(ctx, ctrd.Config{
		Address: m.containerd.Address(), Namespace: m.namespace, InstanceUID: m.store.InstanceUID(),
		StateDir: filepath.Join(m.dir, "state"), DataDir: filepath.Join(m.dir, "data"),
		InitPath: initPath, Logger: logger, Around: around,
		Policy: runtime.Policy{HostPaths: []string{m.probes()}},
	})
	if err != nil {
		return err
	}
	m.actorConfig = workspace.Config{Store: m.store, Runtime: counted{m.driver, m}, Logger: logger, Around: around}
	m.supervisor = workspace.New(m.actorConfig)
	return nil
}

// run starts the supervisor.
func (m *machine) run(ctx context.Context) {
	ctx, m.endActors = context.WithCancel(context.WithoutCancel(ctx))
	m.actors = make(chan error, 1)
	go func() { m.actors <- m.supervisor.Run(ctx) }()
}

// end ends the supervisor, if it runs.
func (m *machine) end(ctx context.Context) error {
	if m.actors == nil {
		return nil
	}
	err := m.supervisor.Drain(ctx)
	m.endActors()
	err = errors.Join(err, <-m.actors)
	m.actors = nil
	return err
}

// limit replaces the supervisor by one that makes so many containers at once.
// Nothing is in flight.
func (m *machine) limit(ctx context.Context, cycles int) error {
	if err := m.end(ctx); err != nil {
		return err
	}
	m.actorConfig.MaxConcurrentCycles = cycles
	m.supervisor = workspace.New(m.actorConfig)
	m.run(ctx)
	return nil
}

// close ends everything and removes all there is of it, also of a machine that
// was started half way.
func (m *machine) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	var errs []error
	errs = append(errs, m.end(ctx))
	if m.driver != nil {
		errs = append(errs, m.removeContainers(ctx), m.driver.Close())
	}
	if m.store != nil {
		errs = append(errs, m.store.Close())
	}
	errs = append(errs, m.containerd.Stop())
	if m.log != nil {
		errs = append(errs, m.log.Close())
	}
	points, err := lab.MountsBelow(m.dir)
	errs = append(errs, err)
	for _, point := range slices.Backward(points) {
		errs = append(errs, unix.Unmount(point, 0))
	}
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} { // of version 2 and 1
		cgroups, err := filepath.Glob(pattern + m.namespace)
		errs = append(errs, err)
		for _, path := range cgroups {
			errs = append(errs, unix.Rmdir(path))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("closing the machine in %s: %w", m.dir, err)
	}
	return os.RemoveAll(m.dir)
}

// removeContainers removes every container, and what outlives them.
func (m *machine) removeContainers(ctx context.Context) error {
	instances, err := m.driver.List(ctx, "")
	if err != nil {
		return err
	}
	var removals errgroup.Group
	removals.SetLimit(2 * goruntime.NumCPU())
	for _, in := range instances {
		removals.Go(func() error { return m.driver.Remove(ctx, in.ID) })
	}
	err = removals.Wait()
	all, _, listErr := m.store.ListWorkspaces("", 0, nil)
	err = errors.Join(err, listErr)
	for _, w := range all {
		err = errors.Join(err, m.driver.RemoveWorkspace(ctx, w.ID, w.UID, false))
	}
	return err
}

// spec is a workspace's whose probe writes its records where records reads them:
// no root user, and a root file system that can't be written.
func (m *machine) spec(id string) store.Spec {
	return store.Spec{
		Image: probeImage, Args: []string{filepath.Join(probeMount, id)}, User: probeUser, ReadOnlyRoot: true,
		Volumes: []store.Volume{{MountPath: probeMount, HostPath: m.probes()}},
	}
}

// secretsOf makes so many secrets of 64 bytes.
func secretsOf(n int) (secrets []store.SecretValue) {
	for i := range n {
		secrets = append(secrets, store.SecretValue{Key: fmt.Sprintf("SECRET_%d", i), Value: seal.New(fmt.Appendf(nil, "%064d", i))})
	}
	return secrets
}

// create makes a workspace with so many secrets and waits until it has settled.
func (m *machine) create(ctx context.Context, id string, secrets int) error {
	res, err := m.store.CreateWorkspace(ctx, store.NewWorkspace{ID: id, Spec: m.spec(id), Secrets: secretsOf(secrets)}, store.Options{})
	if err != nil {
		return err
	}
	return m.settle(ctx, id, res.Workspace.Generation)
}

// restart makes a new generation and waits until it runs and has settled.
func (m *machine) restart(ctx context.Context, id string) error {
	res, err := m.store.RestartWorkspace(ctx, id, store.Options{})
	if err != nil {
		return err
	}
	return m.settle(ctx, id, res.Workspace.Generation)
}

// settle waits until the workspace runs this generation or a later one and
// nothing is left of its older containers.
func (m *machine) settle(ctx context.Context, id string, generation int64) error {
	return m.await(ctx, id, func(w *store.Workspace, containers int) bool {
		return w.Status.ObservedGeneration >= generation && containers == 1
	})
}

// await waits until the workspace's record and the number of its containers are
// as they should be.
func (m *machine) await(ctx context.Context, id string, done func(w *store.Workspace, containers int) bool) error {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for {
		m.mu.Lock()
		changed, containers := m.changed, 0
		for _, workspaceID := range m.containers {
			if workspaceID == id {
				containers++
			}
		}
		m.mu.Unlock()
		w, err := m.store.Workspace(id)
		if err != nil {
			return err
		}
		if done(&w, containers) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("workspace %s did not get there, it has %d containers and status %+v: %w", id, containers, w.Status, ctx.Err())
		}
	}
}

// onCommit is the store's OnCommit.
func (m *machine) onCommit(changes []store.Change) {
	if m.supervisor != nil { // which is there before anything is committed but the database itself
		m.supervisor.OnCommit(changes)
	}
	m.change(func() {})
}

// change does f, which changes containers, and wakes whoever awaits something.
func (m *machine) change(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
	close(m.changed)
	m.changed = make(chan struct{})
}

// counted is the driver for the supervisor: it knows how many containers there
// are.
type counted struct {
	*ctrd.Driver
	m *machine
}

// Prepare is the driver's.
func (c counted) Prepare(ctx context.Context, spec runtime.Spec) (runtime.Instance, error) {
	in, err := c.Driver.Prepare(ctx, spec)
	if err == nil {
		c.m.change(func() { c.m.containers[in.ID] = in.WorkspaceID })
	}
	return in, err
}

// Remove is the driver's.
func (c counted) Remove(ctx context.Context, id string) error {
	err := c.Driver.Remove(ctx, id)
	if err == nil {
		c.m.change(func() { delete(c.m.containers, id) })
	}
	return err
}

// probeRecord is what a probe says of itself; see cmd/bench/probe.
type probeRecord struct {
	End        bool
	At         time.Duration // on CLOCK_MONOTONIC
	PID        int           // as the container counts
	Generation int64
}

// records returns what the workspace's probes have said, in their order.
func (m *machine) records(id string) ([]probeRecord, error) {
	return readRecords(filepath.Join(m.probes(), id))
}

func readRecords(path string) (records []probeRecord, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var r probeRecord
		var err error
		if r.End = strings.HasPrefix(lines.Text(), "end "); r.End {
			_, err = fmt.Sscanf(lines.Text(), "end %d", &r.At)
		} else {
			_, err = fmt.Sscanf(lines.Text(), "start %d %d %d", &r.At, &r.PID, &r.Generation)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %q: %w", path, lines.Text(), err)
		}
		records = append(records, r)
	}
	return records, nil
}

// writeProbeImage writes an image that has the probe alone.
func writeProbeImage(program, tar string) error {
	data, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{
		Architecture: goruntime.GOARCH, OS: "linux",
		Config: v1.Config{Entrypoint: []string{"/" + probeProgram}},
		RootFS: v1.RootFS{Type: "layers"},
	})
	if err != nil {
		return err
	}
	if img, err = lab.AddFile(img, probeProgram, 0o755, data); err != nil {
		return err
	}
	return lab.WriteImage(img, probeImage, tar)
}
