// Package embedded runs a private containerd as a supervised child of the
// daemon: with root, state and configuration of its own, restarted when it
// ends, stopped with the daemon. Shims and containers outlive it.
package embedded

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/workspaced/workspaced/server/loop"
)

// Config says where the private containerd lives.
type Config struct {
	// Binary is the containerd program: a path, or a name to look up in PATH.
	Binary string
	// Root is for what lasts (images, snapshots, metadata), State for what ends
	// with the machine (sockets, bundles). Absolute; made when missing.
	Root, State string
	// LogFile gets containerd's output, and with it its shims'. Two files of at
	// most MaxLogBytes are kept.
	LogFile string
	// MaxLogBytes defaults to 10 MiB.
	MaxLogBytes int64
	Logger      *slog.Logger
	// ReadyTimeout bounds the time from start to the first answer, StopTimeout
	// that from SIGTERM to SIGKILL. Defaults: 30 s and 10 s.
	ReadyTimeout, StopTimeout time.Duration
}

// Address is the socket of the containerd that cfg describes.
func (c Config) Address() string { return filepath.Join(c.State, "containerd.sock") }

func (c Config) configFile() string { return filepath.Join(c.State, "workspaced-containerd.toml") }

// Containerd is a private containerd under supervision.
type Containerd struct {
	cfg   Config
	stop  context.CancelFunc
	kill  context.CancelFunc
	loops *loop.Group // one: who runs the process
}

// LoopName is the name of the supervision in Loops.
const LoopName = "containerd-process"

// lookInterval is how often a containerd that runs is looked at, and its log;
// stale is how long that may not have happened.
const (
	lookInterval = 10 * time.Second
	stale        = time.Minute
)

// Start stops what an earlier daemon, killed, left of this private containerd,
// starts it anew and returns once it answers. It is restarted whenever it ends,
// after a wait, until Close.
func Start(ctx context.Context, cfg Config) (*Containerd, error) {
	cfg = withDefaults(cfg)
	binary, err := exec.LookPath(cfg.Binary)
	if err != nil {
		return nil, fmt.Errorf("no containerd program: %w (install containerd, or name one with --containerd-binary, or a running one with --containerd)", err)
	}
	cfg.Binary = binary
	if err := prepare(cfg); err != nil {
		return nil, err
	}
	if err := StopStray(ctx, cfg); err != nil {
		return nil, err
	}

	run, stop := context.WithCancel(context.Background())
	hard, kill := context.WithCancel(context.Background())
	c := &Containerd{cfg: cfg, stop: stop, kill: kill, loops: loop.New(cfg.Logger)}
	failed := make(chan error, 1) // how the first one ended, or a later one
	c.loops.Run(run, LoopName, stale, func(_ context.Context, beat func()) error {
		err := c.runOnce(run, hard, beat)
		if run.Err() == nil {
			cfg.Logger.Error("private containerd ended, containers go on", "error", err, "log", cfg.LogFile)
		}
		select {
		case failed <- err:
		default:
		}
		return err
	})

	wait, cancel := context.WithTimeout(ctx, cfg.ReadyTimeout)
	defer cancel()
	var answer error
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		answer = WaitReady(wait, cfg.Address())
	}()
	select {
	case <-asked:
		err = answer
	case err = <-failed:
		cancel()
		<-asked
	}
	if err != nil {
		c.Close(ctx)
		return nil, fmt.Errorf("private containerd (%s) does not start: %w%s", cfg.Binary, err, lastLine(cfg.LogFile))
	}
	return c, nil
}

func withDefaults(cfg Config) Config {
	if cfg.Binary == "" {
		cfg.Binary = "containerd"
	}
	if cfg.MaxLogBytes <= 0 {
		cfg.MaxLogBytes = 10 << 20
	}
	if cfg.ReadyTimeout <= 0 {
		cfg.ReadyTimeout = 30 * time.Second
	}
	if cfg.StopTimeout <= 0 {
		cfg.StopTimeout = 10 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return cfg
}

// Address is the socket it serves on.
func (c *Containerd) Address() string { return c.cfg.Address() }

// Loops tells how its supervision does.
func (c *Containerd) Loops() []loop.Status { return c.loops.Status() }

// Close ends the supervision and containerd with it: SIGTERM, and SIGKILL after
// the stop timeout or once ctx has ended. It returns when the process is gone.
func (c *Containerd) Close(ctx context.Context) {
	c.stop()
	defer context.AfterFunc(ctx, c.kill)()
	c.loops.Wait()
	c.kill()
}

// Containerd runs no CRI, no NRI, and makes no directory outside its own.
const configTemplate = `# Written by workspaced at every start.
version = 2
root = %q
state = %q
disabled_plugins = [
  "io.containerd.cri.v1.images",
  "io.containerd.cri.v1.runtime",
  "io.containerd.grpc.v1.cri",
  "io.containerd.internal.v1.opt",
  "io.containerd.internal.v1.restart",
  "io.containerd.internal.v1.tracing",
  "io.containerd.monitor.container.v1.restart",
  "io.containerd.nri.v1.nri",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
  "io.containerd.tracing.processor.v1.otlp",
]

[grpc]
  address = %q
`

func prepare(cfg Config) error {
	for _, dir := range []string{cfg.Root, cfg.State, filepath.Dir(cfg.LogFile)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("private containerd: %w", err)
		}
	}
	// Non-root containers' FIFOs and bundles are reached through it.
	if err := os.Chmod(cfg.State, 0o711); err != nil {
		return fmt.Errorf("private containerd: %w", err)
	}
	if n := len(cfg.Address() + ".ttrpc"); n > maxSocketPath {
		return fmt.Errorf("private containerd: socket path %s.ttrpc has %d bytes, the kernel takes %d: choose a shorter state_dir", cfg.Address(), n, maxSocketPath)
	}
	text := fmt.Sprintf(configTemplate, cfg.Root, cfg.State, cfg.Address())
	if err := os.WriteFile(cfg.configFile(), []byte(text), 0o600); err != nil {
		return fmt.Errorf("private containerd: %w", err)
	}
	return nil
}

const maxSocketPath = 107

// runOnce starts containerd and waits for its end, which run's end brings about.
func (c *Containerd) runOnce(run, hard context.Context, beat func()) error {
	out, err := openLog(c.cfg.LogFile, c.cfg.MaxLogBytes)
	if err != nil {
		return err
	}
	defer out.Close()

	if err := removeBrokenBundles(c.cfg); err != nil {
		c.cfg.Logger.Warn("what an interrupted containerd left can't be removed", "error", err)
	}
	cmd := exec.Command(c.cfg.Binary, "--config", c.cfg.configFile())
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = c.cfg.State
	cmd.Env = childEnv(os.Environ())
	// A session of its own: Ctrl-C in the daemon's terminal is not for it. No
	// Pdeathsig: shims keep their daemon until the next start replaces it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	c.cfg.Logger.Info("private containerd started", "pid", cmd.Process.Pid, "binary", c.cfg.Binary, "address", c.cfg.Address())
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	tick := time.NewTicker(lookInterval)
	defer tick.Stop()
	for {
		select {
		case err := <-exited:
			if err == nil {
				err = errors.New("exit status 0")
			}
			return err
		case <-tick.C:
			beat()
			if err := boundLog(c.cfg.LogFile, c.cfg.MaxLogBytes); err != nil {
				c.cfg.Logger.Warn("private containerd's log can't be bounded", "error", err)
			}
		case <-run.Done():
			return c.terminate(cmd.Process, hard, exited)
		}
	}
}

func (c *Containerd) terminate(p *os.Process, hard context.Context, exited <-chan error) error {
	_ = p.Signal(syscall.SIGTERM) // an error says that it is gone already
	grace := time.NewTimer(c.cfg.StopTimeout)
	defer grace.Stop()
	select {
	case err := <-exited:
		return err
	case <-grace.C:
	case <-hard.Done():
	}
	_ = p.Kill()
	return <-exited
}

// childEnv takes away what belongs to this process alone: containerd would tell
// the service manager that it is ready, in our name.
func childEnv(env []string) []string {
	kept := make([]string, 0, len(env))
	for _, kv := range env {
		switch key, _, _ := strings.Cut(kv, "="); key {
		case "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES":
		default:
			kept = append(kept, kv)
		}
	}
	return kept
}

// openLog opens the file for appending: a truncation by boundLog moves the
// writer's position too.
func openLog(path string, max int64) (*os.File, error) {
	if err := boundLog(path, max); err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
}

// boundLog moves a log that has grown too long to path.1. The writer has the
// file open, so it is copied and emptied.
func boundLog(path string, max int64) error {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil || info.Size() <= max {
		return err
	}
	from, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(path+".1", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, io.NewSectionReader(from, info.Size()-max, max))
	if err := errors.Join(err, to.Close()); err != nil {
		return err
	}
	return from.Truncate(0)
}

// lastLine quotes the end of the log in an error.
func lastLine(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > 4096 {
		_, _ = f.Seek(-4096, io.SeekEnd)
	}
	data, _ := io.ReadAll(f)
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	if last := lines[len(lines)-1]; last != "" {
		return "; its last words: " + last
	}
	return ""
}
