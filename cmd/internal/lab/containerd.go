package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Containerd is containerd as a real process which is not the daemon's child:
// it lives and dies by itself. Its methods are for one goroutine at a time.
type Containerd struct {
	// Dir has everything of it: images, state, socket, log.
	Dir string
	// Path, if set, comes before the PATH of this process.
	Path string

	cmd    *exec.Cmd
	exited chan struct{} // closed once cmd has ended
}

// Address is its socket.
func (c *Containerd) Address() string { return filepath.Join(c.stateDir(), "containerd.sock") }

// stateDir is what a reboot empties.
func (c *Containerd) stateDir() string { return filepath.Join(c.Dir, "state") }

func (c *Containerd) logFile() string { return filepath.Join(c.Dir, "containerd.log") }

const containerdConfig = `version = 2
root = %q
state = %q
disabled_plugins = [
  "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri",
  "io.containerd.internal.v1.opt", "io.containerd.internal.v1.restart", "io.containerd.internal.v1.tracing",
  "io.containerd.monitor.container.v1.restart", "io.containerd.nri.v1.nri",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.tracing.processor.v1.otlp",
]
[grpc]
  address = %q
`

// Start starts it and returns once its socket is there; who dials then waits for
// it to serve.
func (c *Containerd) Start(ctx context.Context) error {
	if c.cmd != nil {
		return errors.New("containerd: runs already")
	}
	if err := os.MkdirAll(c.stateDir(), 0o711); err != nil {
		return err
	}
	// One that was killed leaves it.
	if err := os.Remove(c.Address()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	config := filepath.Join(c.Dir, "config.toml")
	text := fmt.Sprintf(containerdConfig, filepath.Join(c.Dir, "root"), c.stateDir(), c.Address())
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	log, err := os.OpenFile(c.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	program := "containerd"
	cmd := exec.CommandContext(context.WithoutCancel(ctx), filepath.Join(c.Path, program), "--config", config)
	if c.Path == "" {
		cmd = exec.CommandContext(context.WithoutCancel(ctx), program, "--config", config)
	}
	cmd.Env = environ(c.Path)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = c.stateDir()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is for us
	if err := cmd.Start(); err != nil {
		return err
	}
	c.cmd, c.exited = cmd, make(chan struct{})
	go func(exited chan<- struct{}) {
		defer close(exited)
		_ = cmd.Wait() // how it ends, its log tells
	}(c.exited)
	return c.waitSocket(ctx)
}

func (c *Containerd) waitSocket(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Lstat(c.Address()); err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-c.exited:
			c.cmd = nil
			return fmt.Errorf("containerd: %w\n%s", errEnded, c.LogTail())
		case <-ctx.Done():
			return fmt.Errorf("containerd does not listen: %w\n%s", ctx.Err(), c.LogTail())
		}
	}
}

// PID is its process id, 0 when it does not run.
func (c *Containerd) PID() int {
	if c.cmd == nil {
		return 0
	}
	return c.cmd.Process.Pid
}

// Kill ends it by SIGKILL and returns once it is gone. Shims and containers go on.
func (c *Containerd) Kill() error { return c.end(syscall.SIGKILL) }

// Stop ends it by SIGTERM and returns once it is gone. Shims and containers go on.
func (c *Containerd) Stop() error { return c.end(syscall.SIGTERM) }

func (c *Containerd) end(sig syscall.Signal) error {
	if c.cmd == nil {
		return nil
	}
	_ = c.cmd.Process.Signal(sig) // an error says that it is gone
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-c.exited:
		c.cmd = nil
		return nil
	case <-timer.C:
		return fmt.Errorf("containerd does not end within %v\n%s", stopTimeout, c.LogTail())
	}
}

// LogTail is the end of its log.
func (c *Containerd) LogTail() string { return tail(c.logFile()) }

// environ is this process's environment, without the settings of the machine's
// own daemon, and with path before PATH if it is not empty.
func environ(path string) (env []string) {
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "WORKSPACED_") && !strings.HasPrefix(kv, "NOTIFY_SOCKET=") {
			env = append(env, kv)
		}
	}
	if path != "" {
		env = append(env, "PATH="+path+":"+os.Getenv("PATH"))
	}
	return env
}
