// Package ctrd runs instances on containerd: images, snapshots, containers,
// tasks, logs, volumes. It is the only package that imports its client.
//
// # How an instance is built and started
//
// Prepare makes snapshot, container and task, and starts the task: its first
// process is workspace-init, which checks the command, reports over a FIFO and
// waits (package handshake). Start writes the environment into the other FIFO,
// and init becomes the command. Between the old instance's end and the new one's
// exec nothing is asked of containerd: Stop, Start and Watch work with pidfds and
// FIFOs alone.
//
// # What is where
//
//	StateDir/instances/         a tmpfs, 0700
//	  .init-<hash>              workspace-init, bind-mounted into every container
//	  <instance uid>/           of the daemon's database: another one sees none of it
//	    <workspace uid>/<instance id>/
//	      record.json           what the instance was started with
//	      reserve, reserve-files   room for a standby's later records and its files
//	      files/                its files, bind-mounted as /run/secrets, see files.go
//	      io/{go,result}        the FIFOs, bind-mounted as /run/workspaced
//	      io/api/               where APIDir is bind-mounted, if the spec asks for it
//	StateDir/runc/              the OCI runtime's own state
//	DataDir/volumes/<workspace id>/<name>/
//	DataDir/logs/<workspace id>.log, .log.1
//
// containerd has to see these directories at the same paths: both share a mount
// namespace.
package ctrd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/workspaced/workspaced/runtime"
)

// Labels of containers and leases in containerd.
const (
	labelInstanceUID  = "workspaced/instance-uid"
	labelWorkspaceID  = "workspaced/workspace-id"
	labelWorkspaceUID = "workspaced/workspace-uid"
	labelGeneration   = "workspaced/prepared-generation"
	labelImageDigest  = "workspaced/image-digest"
)

// deadlines bound the steps. A caller's context may end them earlier.
type deadlines struct {
	connect time.Duration // New, when its context has no deadline
	pull    time.Duration
	unpack  time.Duration
	prepare time.Duration
	task    time.Duration // creating and starting the task; one question about it
	ready   time.Duration // from the task's start to init's report
	start   time.Duration
	list    time.Duration
	inspect time.Duration // one instance of a list
	remove  time.Duration
	kill    time.Duration // from SIGKILL to the process's end
	exit    time.Duration // from there to its exit code
}

var defaultDeadlines = deadlines{
	connect: 30 * time.Second,
	pull:    30 * time.Minute,
	unpack:  10 * time.Minute,
	prepare: 2 * time.Minute,
	task:    30 * time.Second,
	ready:   20 * time.Second,
	start:   20 * time.Second,
	list:    time.Minute,
	inspect: 5 * time.Second,
	remove:  time.Minute,
	kill:    20 * time.Second,
	exit:    3 * time.Second,
}

// Config configures a Driver.
type Config struct {
	// Address is containerd's socket.
	Address string
	// Namespace is containerd's namespace; empty: "workspaced".
	Namespace string
	// InstanceUID identifies this daemon's database. The driver sees and touches
	// only containers that carry it.
	InstanceUID string
	// StateDir holds what lives as long as processes do, DataDir what outlives
	// them. Both are absolute and made at need.
	StateDir, DataDir string
	// InitPath is the workspace-init binary.
	InitPath string
	// APIDir is the directory of the daemon's socket for containers, made at need and
	// never removed: what runs has it mounted. Empty: StateDir/api.
	APIDir string
	// Snapshotter is containerd's snapshotter; empty: overlayfs.
	Snapshotter string
	// RuntimeBinary is the OCI runtime, a path or a name in containerd's PATH;
	// empty: runc.
	RuntimeBinary string
	// MaxLogBytes bounds a workspace's log: a log that BoundLogs finds to be longer
	// becomes the older one, of which the newest MaxLogBytes are kept beside it. 0:
	// 64 MiB.
	MaxLogBytes int64
	// Registries says how registries are reached.
	Registries Registries
	// Policy says what specs may ask of the machine.
	Policy runtime.Policy
	// Around is what every step of an effect passes through, by its name in Steps:
	// tests make steps fail in it. It calls do and returns its error; nil: that and
	// nothing else.
	Around func(ctx context.Context, step string, do func(context.Context) error) error `json:"-"`
	// Logger gets what callers don't; nil: slog.Default.
	Logger *slog.Logger
}

// Driver implements server/workspace.Runtime on containerd.
type Driver struct {
	cfg       Config
	around    func(ctx context.Context, step string, do func(context.Context) error) error
	deadlines deadlines
	log       *slog.Logger
	client    *client.Client
	tmpfs     string // StateDir/instances
	instances string // StateDir/instances/<instance uid>
	runcRoot  string
	volumes   string
	logs      string
	initPath  string // the copy that containers mount
	initID    fileID
	cgroups   []string // mount points

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	pulls  flights

	watches *watches

	logMu sync.Mutex // held by BoundLogs

	recordMu sync.Mutex // held while a record is changed

	mu       sync.Mutex
	standbys map[string]*standby   // by instance id; this process holds their FIFOs
	held     map[string][]*os.File // namespaces of instances that end, by instance id
	owners   map[string]string     // the workspace's uid by instance id, as far as it was asked for
	images   map[string]*rootfs    // by digest
	// recordedOf has the workspaces, by uid, of which containerd was asked and had
	// nothing that was not on record, with the ids of what is; see allRecorded.
	recordedOf map[string]map[string]bool
	closed     bool
	// unreleased are the ids of leases whose end has failed. They expire.
	unreleased []string
}

// New connects to containerd and prepares the directories. It waits for
// containerd until ctx ends, 30 seconds at most.
func New(ctx context.Context, cfg Config) (*Driver, error) {
	if cfg.Namespace == "" {
		cfg.Namespace = "workspaced"
	}
	if cfg.Snapshotter == "" {
		cfg.Snapshotter = "overlayfs"
	}
	if cfg.MaxLogBytes == 0 {
		cfg.MaxLogBytes = 64 << 20
	}
	if cfg.APIDir == "" {
		cfg.APIDir = filepath.Join(cfg.StateDir, "api")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.Around == nil {
		cfg.Around = plain
	}
	if !workspaceUID.MatchString(cfg.InstanceUID) { // it becomes a file name too
		return nil, fmt.Errorf("containerd driver: %q is no instance uid", cfg.InstanceUID)
	}
	for _, path := range []struct{ name, path string }{
		{"state directory", cfg.StateDir}, {"data directory", cfg.DataDir}, {"directory of the API's socket", cfg.APIDir}, {"workspace-init", cfg.InitPath},
	} {
		if !filepath.IsAbs(path.path) {
			return nil, fmt.Errorf("containerd driver: %s %q is not an absolute path", path.name, path.path)
		}
	}
	if cfg.MaxLogBytes < 0 {
		return nil, fmt.Errorf("containerd driver: logs of %d bytes", cfg.MaxLogBytes)
	}
	if err := cfg.Registries.validate(); err != nil {
		return nil, err
	}
	if err := probePidfd(); err != nil {
		return nil, err
	}
	// The client has a logger of its own. What matters comes back as an error.
	if err := log.SetLevel(log.ErrorLevel.String()); err != nil {
		return nil, err
	}
	d := &Driver{
		cfg:       cfg,
		around:    cfg.Around,
		deadlines: defaultDeadlines,
		log:       cfg.Logger,
		tmpfs:     filepath.Join(cfg.StateDir, "instances"),
		instances: filepath.Join(cfg.StateDir, "instances", cfg.InstanceUID),
		runcRoot:  filepath.Join(cfg.StateDir, "runc"),
		volumes:   filepath.Join(cfg.DataDir, "volumes"),
		logs:      filepath.Join(cfg.DataDir, "logs"),
		standbys:  make(map[string]*standby),
		held:      make(map[string][]*os.File),
		images:    make(map[string]*rootfs),

		recordedOf: make(map[string]map[string]bool),
	}
	var err error
	if d.cgroups, err = cgroupMounts(); err != nil {
		return nil, fmt.Errorf("cgroup mounts: %w", err)
	}
	if err := d.prepareState(ctx); err != nil {
		return nil, fmt.Errorf("containerd driver: %w", err)
	}

	fast := backoff.DefaultConfig
	fast.BaseDelay = 20 * time.Millisecond
	fast.MaxDelay = time.Second
	d.client, err = client.New(cfg.Address,
		client.WithDefaultNamespace(cfg.Namespace),
		client.WithDefaultRuntime(runtimeName),
		client.WithExtraDialOpts([]grpc.DialOption{
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: fast, MinConnectTimeout: 5 * time.Second}),
			// The client's own dialer tries for seconds, while calls wait.
			grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
				var dialer net.Dialer
				return dialer.DialContext(ctx, "unix", strings.TrimPrefix(address, "unix://"))
			}),
		}))
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", cfg.Address, err)
	}
	d.ctx, d.cancel = context.WithCancel(namespaces.WithNamespace(context.Background(), cfg.Namespace))
	if err = d.connect(ctx); err == nil {
		d.watches, err = newWatches(d.watchEnded)
	}
	if err != nil {
		d.cancel()
		d.client.Close()
		return nil, err
	}
	return d, nil
}

// connect waits for containerd and drops what an earlier process left half-way.
func (d *Driver) connect(ctx context.Context) error {
	ctx, cancel := d.bound(ctx, d.deadlines.connect)
	defer cancel()
	for {
		serving, err := d.client.IsServing(ctx)
		if err == nil && serving {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("containerd at %s does not answer: %w", d.cfg.Address, errors.Join(ctx.Err(), err))
		case <-time.After(50 * time.Millisecond):
		}
	}
	return d.dropLeases(ctx)
}

// Close ends pulls in flight and watches, and lets go of standby instances, which
// end by themselves. Running instances go on; where there are none, no cgroup of
// ours is left.
func (d *Driver) Close() error {
	d.mu.Lock()
	d.closed = true
	standbys, held := d.standbys, slices.Collect(maps.Keys(d.held))
	d.standbys = nil
	d.mu.Unlock()
	for _, s := range standbys {
		s.close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), d.deadlines.kill)
	defer cancel()
	for _, id := range held {
		d.dropNamespaces(ctx, id)
	}
	d.cancel()
	d.pulls.wait()
	d.watches.close()
	d.removeEmptyCgroup(d.cfg.Namespace)
	return d.client.Close()
}

// bound puts containerd's namespace and a deadline on ctx.
func (d *Driver) bound(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(namespaces.WithNamespace(ctx, d.cfg.Namespace), timeout)
}

// detached is bound for what has to be finished although the caller has gone.
func (d *Driver) detached(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	return d.bound(context.WithoutCancel(ctx), timeout)
}

// probePidfd tells on what kernel the driver works.
func probePidfd() error {
	fd, err := unix.PidfdOpen(unix.Getpid(), unix.PIDFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("containerd driver: pidfds are needed, Linux 5.10 or later: %w", err)
	}
	return unix.Close(fd)
}
