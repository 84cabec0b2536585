package embedded

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// StopStray ends every containerd that serves cfg's state and is nobody's child
// any more: its daemon was killed. The caller holds the lock of that state, so
// no daemon that lives owns one.
//
// It is known by its command line, which names cfg's own configuration file: no
// pid file that a crash could keep from being written, or that names a process
// which is another one by now.
func StopStray(ctx context.Context, cfg Config) error {
	cfg = withDefaults(cfg)
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("looking for a containerd left behind: %w", err)
	}
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if err := stopIfOurs(ctx, cfg, pid); err != nil {
			return fmt.Errorf("containerd left behind, pid %d: %w", pid, err)
		}
	}
	return nil
}

func stopIfOurs(ctx context.Context, cfg Config, pid int) error {
	if !isOurs(pid, cfg.configFile()) {
		return nil
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// Again, now that the pid can't become another process.
	if !isOurs(pid, cfg.configFile()) {
		return nil
	}
	cfg.Logger.Info("stopping the private containerd of an earlier daemon", "pid", pid)
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
		if gone, err := waitPidfd(ctx, fd, cfg.StopTimeout); gone || err != nil {
			return err
		}
	}
	return errors.New("does not end, not even by SIGKILL")
}

// isOurs reads the command line that Containerd.runOnce gives its child.
func isOurs(pid int, configFile string) bool {
	cmdline, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil {
		return false // it ended meanwhile
	}
	args := bytes.Split(bytes.TrimSuffix(cmdline, []byte{0}), []byte{0})
	return len(args) == 3 && string(args[1]) == "--config" && string(args[2]) == configFile
}

// waitPidfd reports whether the process ended within the timeout.
func waitPidfd(ctx context.Context, fd int, timeout time.Duration) (bool, error) {
	deadline := time.Now().Add(timeout)
	for {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		left := time.Until(deadline)
		if left <= 0 {
			return false, nil
		}
		// Short polls, so that ctx is heard.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(min(left, 100*time.Millisecond)/time.Millisecond)+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return false, err
		}
		if n > 0 {
			return true, nil
		}
	}
}

// WaitReady returns once a containerd answers on the socket, or ctx ends.
func WaitReady(ctx context.Context, address string) error {
	conn, err := dial(address)
	if err != nil {
		return err
	}
	defer conn.Close()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	var last error // of a try that the end of ctx did not cut short
	for {
		err := check(ctx, conn)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return noAnswer(address, cmp.Or(last, err))
		}
	}
}

// noAnswer says why nobody answers: what the kernel says of the socket if it
// refuses, else what the last try came to.
func noAnswer(address string, last error) error {
	conn, err := net.DialTimeout("unix", address, time.Second)
	if err != nil {
		return fmt.Errorf("no answer on %s: %w", address, err)
	}
	conn.Close()
	return fmt.Errorf("no answer on %s, though something listens there: %w", address, last)
}

// Answers reports whether a containerd answers on the socket right now.
func Answers(ctx context.Context, address string) bool {
	if _, err := os.Stat(address); err != nil {
		return false
	}
	conn, err := dial(address)
	if err != nil {
		return false
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return check(ctx, conn) == nil
}

func dial(address string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: grpcbackoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}, MinConnectTimeout: time.Second}))
}

func check(ctx context.Context, conn *grpc.ClientConn) error {
	resp, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		return err
	}
	if resp.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		return fmt.Errorf("containerd says %s", resp.Status)
	}
	return nil
}
