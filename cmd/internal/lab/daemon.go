package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// Deadlines of a real daemon, generous: machines are slow at times.
const (
	startTimeout = time.Minute
	stopTimeout  = time.Minute
	purgeTimeout = 2 * time.Minute
)

var errEnded = errors.New("the process is gone")

// Daemon is workspaced as a real process with everything it makes below one
// directory. Its methods are for one goroutine at a time.
type Daemon struct {
	// Binary is the workspaced program; workspace-init lies beside it.
	Binary string
	// Base is the directory.
	Base string
	// Args are further flags of `serve` and `purge`.
	Args []string
	// Path, if set, comes before the PATH of this process.
	Path string
	// Own, if not nil, is the containerd that the daemon is told to use; else it
	// runs a private one.
	Own *Containerd
	// DialOptions are further options of Conn.
	DialOptions []grpc.DialOption

	faults string // the file with the rules; empty: the program knows none
	cmd    *exec.Cmd
	exited chan error
	conn   *grpc.ClientConn
}

// Socket is the API's.
func (d *Daemon) Socket() string { return filepath.Join(d.StateDir(), "workspaced.sock") }

// StateDir is the daemon's.
func (d *Daemon) StateDir() string { return filepath.Join(d.Base, "run") }

// DataDir is the daemon's.
func (d *Daemon) DataDir() string { return filepath.Join(d.Base, "data") }

// LogFile gets the daemon's output.
func (d *Daemon) LogFile() string { return filepath.Join(d.Base, "daemon.log") }

// Containerd is the socket of the containerd that it uses.
func (d *Daemon) Containerd() string {
	if d.Own != nil {
		return d.Own.Address()
	}
	return filepath.Join(d.StateDir(), "containerd", "containerd.sock")
}

func (d *Daemon) command(ctx context.Context, verb string, more ...string) *exec.Cmd {
	args := []string{verb, "--data-dir", d.DataDir(), "--state-dir", d.StateDir()}
	if d.Own != nil {
		args = append(args, "--containerd", d.Own.Address())
	} else {
		args = append(args, "--private-containerd")
	}
	args = append(args, d.Args...)
	cmd := exec.CommandContext(ctx, d.Binary, append(args, more...)...)
	cmd.Env = environ(d.Path)
	cmd.Dir = d.Base // where a core file would be
	if d.faults != "" {
		cmd.Env = append(cmd.Env, "WORKSPACED_FAULTS=@"+d.faults)
	}
	// Ctrl-C in a terminal is for us; we then end the daemon.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// Start starts the daemon and returns once its health is SERVING.
func (d *Daemon) Start(ctx context.Context) error {
	if err := d.Launch(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := d.waitServing(ctx); err != nil {
		_ = d.Kill() // the error that made it necessary is the one to tell
		return fmt.Errorf("daemon does not start: %w\n%s", err, d.LogTail())
	}
	return nil
}

// Launch starts the daemon, and its own containerd if it is to have one that does
// not run, and does not wait for it.
func (d *Daemon) Launch(ctx context.Context) error {
	if d.Own != nil && d.Own.PID() == 0 {
		if err := d.Own.Start(ctx); err != nil {
			return err
		}
	}
	if d.cmd != nil {
		return errors.New("daemon: runs already")
	}
	log, err := os.OpenFile(d.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	d.cmd = d.command(context.WithoutCancel(ctx), "serve")
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if err := d.cmd.Start(); err != nil {
		d.cmd = nil
		return err
	}
	d.exited = make(chan error, 1)
	go func(cmd *exec.Cmd, exited chan<- error) { exited <- cmd.Wait() }(d.cmd, d.exited)
	return nil
}

func (d *Daemon) waitServing(ctx context.Context) error {
	conn, err := d.dial()
	if err != nil {
		return err
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		try, cancel := context.WithTimeout(ctx, 5*time.Second)
		resp, err := healthv1.NewHealthClient(conn).Check(try, &healthv1.HealthCheckRequest{})
		cancel()
		if err == nil && resp.Status == healthv1.HealthCheckResponse_SERVING {
			return nil
		}
		select {
		case err := <-d.exited:
			d.exited <- err
			return fmt.Errorf("it ended: %w", errors.Join(errEnded, err))
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-tick.C:
		}
	}
}

func (d *Daemon) dial() (conn *grpc.ClientConn, err error) {
	if d.conn == nil {
		d.conn, err = grpc.NewClient("unix://"+d.Socket(), append([]grpc.DialOption{
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.2, MaxDelay: 50 * time.Millisecond},
				MinConnectTimeout: time.Second,
			}),
		}, d.DialOptions...)...)
	}
	return d.conn, err
}

// Client is a client of the daemon; the connection outlives restarts.
func (d *Daemon) Client() workspacev1.WorkspaceControlClient {
	return workspacev1.NewWorkspaceControlClient(d.conn)
}

// Conn is its connection.
func (d *Daemon) Conn() *grpc.ClientConn { return d.conn }

// PID is the daemon's process id, 0 when it does not run.
func (d *Daemon) PID() int {
	if d.cmd == nil {
		return 0
	}
	return d.cmd.Process.Pid
}

// Kill ends the daemon by SIGKILL and returns once it is gone. Containers and
// the private containerd go on.
func (d *Daemon) Kill() error {
	if d.cmd == nil {
		return nil
	}
	_ = d.cmd.Process.Kill() // an error says that it is gone
	err := <-d.exited
	d.cmd = nil
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return nil // as it should be
	}
	return err
}

// WaitKilled returns once the daemon was ended by a SIGKILL, as one that kills
// itself is. It is an error if it ends in another way, or not before ctx does.
func (d *Daemon) WaitKilled(ctx context.Context) error {
	err := d.WaitExit(ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	d.cmd = nil
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return nil
	}
	return fmt.Errorf("daemon was not killed, it ended by itself: %w\n%s", errors.Join(errEnded, err), d.LogTail())
}

// Signal sends the daemon a signal.
func (d *Daemon) Signal(sig os.Signal) error { return d.cmd.Process.Signal(sig) }

// Stop ends the daemon by SIGTERM. It is an error if it does not end well.
func (d *Daemon) Stop() error {
	if d.cmd == nil {
		return nil
	}
	_ = d.Signal(syscall.SIGTERM) // an error says that it is gone
	return d.WaitStopped()
}

// WaitStopped returns once a daemon that was told to end has ended. It is an
// error if it does not end well.
func (d *Daemon) WaitStopped() error {
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case err := <-d.exited:
		d.cmd = nil
		if err != nil {
			return fmt.Errorf("daemon did not end well: %w\n%s", err, d.LogTail())
		}
		return nil
	case <-timer.C:
		return errors.Join(fmt.Errorf("daemon does not end within %v\n%s", stopTimeout, d.LogTail()), d.Kill())
	}
}

// WaitExit returns how the daemon ended, once it has, or the end of ctx.
func (d *Daemon) WaitExit(ctx context.Context) error {
	select {
	case err := <-d.exited:
		d.exited <- err // for Stop
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Purge removes everything that the daemon made; it must not run.
func (d *Daemon) Purge(ctx context.Context) error {
	if d.conn != nil {
		_ = d.conn.Close() // nothing depends on it any more
		d.conn = nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), purgeTimeout)
	defer cancel()
	out, err := d.command(ctx, "purge", "--yes").CombinedOutput()
	if err != nil {
		return fmt.Errorf("purge: %w\n%s", err, out)
	}
	return nil
}

// LogTail is the end of the daemon's log.
func (d *Daemon) LogTail() string { return tail(d.LogFile()) }

// ContainerdLogTail is the end of containerd's log.
func (d *Daemon) ContainerdLogTail() string {
	if d.Own != nil {
		return d.Own.LogTail()
	}
	return tail(filepath.Join(d.DataDir(), "containerd.log"))
}

func tail(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > 8192 {
		_, _ = f.Seek(-8192, io.SeekEnd) // at worst it is the beginning
	}
	data, _ := io.ReadAll(f)
	return string(data)
}
