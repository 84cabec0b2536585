package rows

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
	"github.com/workspaced/workspaced/cmd/internal/lab"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

var daemonRow = Row{
	Name:  "daemon",
	What:  "the daemon's idle CPU, memory, size and start, beside containerd's and a bare gRPC server's",
	Limit: 3 * time.Minute,
	Run: func(ctx context.Context, env *Env) ([]measure.Result, error) {
		return daemon(ctx, env, daemonSizes{running: 10, stopped: 100, windows: 3, window: 6 * time.Second, starts: 5})
	},
}

// daemonSizes say how much is measured.
type daemonSizes struct {
	running, stopped int           // workspaces
	windows          int           // in which nothing happens
	window           time.Duration // how long one is
	starts           int
	slow             func() error // nil, or a further step in our start
}

// bareServerEnv, in the environment, makes a program a bare gRPC server.
const bareServerEnv = "BENCH_BARE_SERVER"

// BareServer serves nothing but health on the unix socket that the environment
// names, until it is killed; it returns at once if there is none. The program that
// runs the rows calls it first: the daemon's row starts it again as this.
func BareServer() {
	socket := os.Getenv(bareServerEnv)
	if socket == "" {
		return
	}
	listener, err := net.Listen("unix", socket)
	if err == nil {
		g := grpc.NewServer()
		healthv1.RegisterHealthServer(g, health.NewServer())
		err = g.Serve(listener)
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// daemon measures real processes: the daemon on a containerd of its own with
// workspaces at rest, that containerd, and a bare gRPC server.
func daemon(ctx context.Context, env *Env, sizes daemonSizes) (_ []measure.Result, err error) {
	if _, err := env.program("workspaced"); err != nil {
		return nil, err
	}
	stage, err := lab.NewStage(lab.Options{BinDir: env.BinDir, Group: -1, OwnContainerd: true})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, stage.Close(context.WithoutCancel(ctx))) }()
	d := stage.Daemon
	if err := populate(ctx, stage, sizes); err != nil {
		return nil, err
	}
	bare := &bareServer{dir: d.Base}
	defer func() { err = errors.Join(err, bare.stop()) }()

	started, err := starts(ctx, d, bare, sizes)
	if err != nil {
		return nil, err
	}
	cpu, err := idle(ctx, d, bare, sizes)
	if err != nil {
		return nil, err
	}
	var rss, size [3]measure.Samples
	for i, pid := range []int{d.PID(), d.Own.PID(), bare.pid()} {
		kib, err := residentKiB(pid)
		if err != nil {
			return nil, err
		}
		info, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
		if err != nil {
			return nil, err
		}
		rss[i] = measure.Samples{float64(kib) / 1024}
		size[i] = measure.Samples{float64(info.Size()) / (1 << 20)}
	}
	var results []measure.Result
	compare := func(figure, unit string, s [3]measure.Samples, goals ...measure.Goal) {
		results = append(results,
			measure.Compare("daemon/"+figure, unit, s[0], "containerd", s[1], goals...),
			measure.Compare("daemon/"+figure+" beside gRPC", unit, s[0], "a bare gRPC server", s[2]))
	}
	compare(fmt.Sprintf("idle CPU with %d workspaces", sizes.running+sizes.stopped), "%", cpu, measure.MedianAtMost(0.1))
	compare("resident memory", "MiB", rss)
	compare("start to SERVING", "ms", started)
	return append(results, measure.Compare("daemon/binary", "MiB", size[0], "containerd", size[1])), nil
}

// populate starts the daemon, makes the workspaces, and ends it again.
func populate(ctx context.Context, stage *lab.Stage, sizes daemonSizes) error {
	d := stage.Daemon
	if err := d.Start(ctx); err != nil {
		return err
	}
	d.Args = nil // the image is there now
	client := d.Client()
	for i := range sizes.running {
		id := fmt.Sprintf("r%03d", i)
		_, err := client.CreateWorkspace(ctx, &workspacev1.CreateWorkspaceRequest{WorkspaceId: id, Workspace: &workspacev1.Workspace{
			Spec: &workspacev1.WorkspaceSpec{
				Image:   lab.DemoImage,
				Env:     map[string]string{"ENVSERVER_SOCKET": "/demo/" + id + ".sock"},
				Volumes: []*workspacev1.Volume{{MountPath: "/demo", Source: &workspacev1.Volume_HostPath{HostPath: stage.VolumeDir}}},
			},
		}})
		if err != nil {
			return err
		}
	}
	for i := range sizes.running {
		if _, err := client.WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{Name: fmt.Sprintf("workspaces/r%03d", i)}); err != nil {
			return err
		}
	}
	if err := d.Stop(); err != nil {
		return err
	}
	return addStopped(ctx, d.DataDir(), sizes.stopped)
}

// addStopped adds workspaces that were stopped before they ever ran.
func addStopped(ctx context.Context, dataDir string, n int) (err error) {
	kek, err := seal.Load(filepath.Join(dataDir, "workspaced.key"))
	if err != nil {
		return err
	}
	st, err := store.Open(store.Config{Path: filepath.Join(dataDir, "workspaced.db"), KEK: kek})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			id := fmt.Sprintf("s%03d", i)
			_, err := st.CreateWorkspace(ctx, store.NewWorkspace{ID: id, Spec: store.Spec{Image: lab.DemoImage}}, store.Options{})
			if err == nil {
				_, err = st.StopWorkspace(ctx, id, store.Options{})
			}
			errs[i] = err
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// starts measures how long from a process's start until its health is SERVING, of
// the daemon, containerd and the bare server. In the end all three run.
func starts(ctx context.Context, d *lab.Daemon, bare *bareServer, sizes daemonSizes) (took [3]measure.Samples, err error) {
	side := func(i int, stop func() error, start func(context.Context) error, socket string) func() error {
		return func() error {
			if err := stop(); err != nil {
				return err
			}
			begin := time.Now()
			if err := start(ctx); err != nil {
				return err
			}
			if err := serving(ctx, socket); err != nil {
				return err
			}
			took[i].Add(time.Since(begin), time.Millisecond)
			return nil
		}
	}
	launch := func(ctx context.Context) error {
		if sizes.slow != nil {
			if err := sizes.slow(); err != nil {
				return err
			}
		}
		return d.Launch(ctx)
	}
	ours := side(0, d.Stop, launch, d.Socket())
	err = measure.Alternate(ctx, sizes.starts,
		func() error { return errors.Join(ours(), d.Stop()) }, // containerd is about to stop
		side(1, d.Own.Stop, d.Own.Start, d.Own.Address()),
		side(2, bare.stop, bare.start, bare.socket()))
	if err != nil {
		return took, err
	}
	if err := d.Start(ctx); err != nil {
		return took, fmt.Errorf("%w\n%s", err, d.LogTail())
	}
	return took, nil
}

// serving returns once a server's health says SERVING.
func serving(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if c, err := net.Dial("unix", socket); err == nil {
			_ = c.Close()
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", socket, ctx.Err())
		}
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	for {
		resp, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{}, grpc.WaitForReady(true))
		if err == nil && resp.Status == healthv1.HealthCheckResponse_SERVING {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		}
	}
}

// idle measures the CPU time of the daemon, containerd and the bare server while
// nobody asks anything of them, in the same windows, in %.
func idle(ctx context.Context, d *lab.Daemon, bare *bareServer, sizes daemonSizes) (cpu [3]measure.Samples, err error) {
	pids := [3]int{d.PID(), d.Own.PID(), bare.pid()}
	read := func() (used [3]time.Duration, err error) {
		for i, pid := range pids {
			if used[i], err = cpuTime(pid); err != nil {
				return used, err
			}
		}
		return used, nil
	}
	if err := pause(ctx, min(2*time.Second, sizes.window)); err != nil { // the start's own work
		return cpu, err
	}
	before, err := read()
	for range sizes.windows {
		if err != nil {
			return cpu, err
		}
		begin := time.Now()
		if err := pause(ctx, sizes.window); err != nil {
			return cpu, err
		}
		var after [3]time.Duration
		after, err = read()
		window := time.Since(begin)
		for i := range cpu {
			cpu[i] = append(cpu[i], 100*float64(after[i]-before[i])/float64(window))
		}
		before = after
	}
	return cpu, err
}

// cpuTime is the CPU time of a process, of all its threads, from the clock that the
// kernel has for it: /proc/PID/stat has ticks of 10 ms, of which 0.1 % of some
// seconds is less than one.
func cpuTime(pid int) (time.Duration, error) {
	const cpuclockSched = 2 // clockid of a process: see clock_getcpuclockid(3)
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|cpuclockSched), &ts); err != nil {
		return 0, fmt.Errorf("CPU time of %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// residentKiB is the resident memory of a process.
func residentKiB(pid int) (kib int, err error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	_, err = fmt.Sscan(rest, &kib)
	return kib, err
}

// bareServer is BareServer as a process.
type bareServer struct {
	dir string
	cmd *exec.Cmd
}

func (b *bareServer) socket() string { return filepath.Join(b.dir, "bare") }

func (b *bareServer) pid() int { return b.cmd.Process.Pid }

func (b *bareServer) start(ctx context.Context) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(context.WithoutCancel(ctx), exe)
	cmd.Env = append(os.Environ(), bareServerEnv+"="+b.socket())
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	b.cmd = cmd
	return nil
}

// stop ends it, if it runs, and waits for its end.
func (b *bareServer) stop() error {
	if b.cmd == nil {
		return nil
	}
	_ = b.cmd.Process.Kill() // an error says that it is gone
	_ = b.cmd.Wait()         // how it ends is known
	b.cmd = nil
	if err := os.Remove(b.socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
