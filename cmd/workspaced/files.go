package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/server"
)

// stateLock keeps a second daemon from the state directory, where it would take
// the first one's containerd for one that was left behind.
type stateLock struct{ file *os.File }

// lockState makes data and state directory and takes the lock, which the kernel
// takes back when the process ends, however it ends.
func lockState(cfg config) (*stateLock, error) {
	gid, err := groupID(cfg.SocketGroup)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("data_dir: %w", err)
	}
	if err := os.MkdirAll(cfg.StateDir, 0o750); err != nil {
		return nil, fmt.Errorf("state_dir: %w", err)
	}
	if err := errors.Join(os.Chown(cfg.StateDir, -1, gid), os.Chmod(cfg.StateDir, 0o750)); err != nil {
		return nil, fmt.Errorf("state_dir: %w", err)
	}
	path := lockFile(cfg)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state_dir: %w", err)
	}
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		defer f.Close()
		if pid := lockHolder(f); pid > 0 {
			return nil, fmt.Errorf("another workspaced (pid %d) runs with state_dir %s", pid, cfg.StateDir)
		}
		return nil, fmt.Errorf("another workspaced runs with state_dir %s", cfg.StateDir)
	case err != nil:
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	if err := errors.Join(f.Truncate(0), writePID(f)); err != nil {
		f.Close()
		return nil, fmt.Errorf("write %s: %w", path, err)
	}
	return &stateLock{f}, nil
}

func writePID(f *os.File) error {
	_, err := fmt.Fprintln(f, os.Getpid())
	return err
}

// lockHolder returns the pid that the holder of the lock wrote into it; 0 if it
// has not done so yet.
func lockHolder(f *os.File) int {
	text, err := io.ReadAll(io.LimitReader(f, 32))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0
	}
	return pid
}

func lockFile(cfg config) string { return filepath.Join(cfg.StateDir, "workspaced.lock") }

func (l *stateLock) release() { l.file.Close() }

// checkFiles looks whether the files are there that the configuration names,
// before anything is started or made.
func checkFiles(cfg config) error {
	if _, err := cfg.initProgram(); err != nil {
		return err
	}
	for _, path := range cfg.ImportImages {
		if err := checkFile(path); err != nil {
			return fmt.Errorf("import_images: %w", err)
		}
	}
	for _, path := range cfg.RegistryCAFiles {
		if err := checkFile(path); err != nil {
			return fmt.Errorf("registry_ca_files: %w", err)
		}
	}
	return nil
}

// checkFile says what keeps path from being read.
func checkFile(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return fmt.Errorf("%s is a directory", path)
	}
	return nil
}

// initProgram is the path of workspace-init.
func (c *config) initProgram() (string, error) {
	path := c.InitPath
	if path == "" {
		exe, err := os.Executable()
		if err != nil {
			return "", fmt.Errorf("init_path: %w", err)
		}
		path = filepath.Join(filepath.Dir(exe), "workspace-init")
	}
	if err := checkFile(path); err != nil {
		return "", fmt.Errorf("init_path: %w", err)
	}
	return path, nil
}

// groupID resolves a group; -1, which changes nothing, for none.
func groupID(group string) (int, error) {
	if group == "" {
		return -1, nil
	}
	if gid, err := strconv.Atoi(group); err == nil && gid >= 0 {
		return gid, nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return 0, fmt.Errorf("socket_group: there is no group %q", group)
	}
	return strconv.Atoi(g.Gid)
}

// listeners are the daemon's sockets.
type listeners struct {
	api        []*server.BoundedListener
	containers net.Listener
	metrics    net.Listener // nil: not wanted
}

// refused counts the connections that were one too many.
func (ls *listeners) refused() (n uint64) {
	for _, l := range ls.api {
		n += l.Refused()
	}
	return n
}

func (ls *listeners) close() {
	for _, l := range ls.api {
		l.Close()
	}
	for _, l := range []net.Listener{ls.containers, ls.metrics} {
		if l != nil {
			l.Close()
		}
	}
}

// listen opens the sockets, all or none.
func listen(ctx context.Context, cfg config) (_ *listeners, err error) {
	ls := &listeners{}
	defer func() {
		if err != nil {
			ls.close()
		}
	}()
	gid, err := groupID(cfg.SocketGroup)
	if err != nil {
		return nil, err
	}
	l, err := listenUnix(ctx, "socket", cfg.Socket, gid)
	if err != nil {
		return nil, err
	}
	ls.api = append(ls.api, server.BoundConnections(l, cfg.MaxConnections))
	if ls.containers, err = listenContainers(ctx, cfg.apiDir()); err != nil {
		return nil, err
	}
	if cfg.Listen != "" {
		l, err := listenTCP(ctx, "listen", cfg.Listen)
		if err != nil {
			return nil, err
		}
		ls.api = append(ls.api, server.BoundConnections(l, cfg.MaxConnections))
	}
	switch path := cfg.metricsSocket(); {
	case path != "":
		ls.metrics, err = listenUnix(ctx, "metrics_listen", path, gid)
	case cfg.MetricsListen != "":
		ls.metrics, err = listenTCP(ctx, "metrics_listen", cfg.MetricsListen)
	}
	return ls, err
}

// listenTCP opens the socket of a setting.
func listenTCP(ctx context.Context, key, address string) (net.Listener, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	return l, nil
}

// listenUnix opens the socket of a setting for root and the group.
func listenUnix(ctx context.Context, key, path string, gid int) (net.Listener, error) {
	dir := filepath.Dir(path)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := errors.Join(os.MkdirAll(dir, 0o750), os.Chown(dir, -1, gid)); err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
	}
	if err := removeStale(ctx, path); err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	// Made with umask 022: until here only root can connect.
	if err := errors.Join(os.Chown(path, -1, gid), os.Chmod(path, 0o660)); err != nil {
		l.Close()
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	return l, nil
}

// apiDir is the directory that containers with workspace_api have mounted.
func (c *config) apiDir() string { return filepath.Join(c.StateDir, "api") }

// listenContainers opens the socket of containers, for every user in them. The
// directory is never removed: containers have it mounted, and find the next
// daemon's socket in it. On the machine only those get there who get into the state
// directory, and nothing but a container's token counts.
func listenContainers(ctx context.Context, dir string) (net.Listener, error) {
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.Chmod(dir, 0o755)); err != nil {
		return nil, fmt.Errorf("state_dir: %w", err)
	}
	path := filepath.Join(dir, runtime.APISocket)
	if err := removeStale(ctx, path); err != nil {
		return nil, fmt.Errorf("state_dir: %w", err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("state_dir: %w", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, fmt.Errorf("state_dir: %w", err)
	}
	return l, nil
}

// removeStale removes a socket that nobody serves any more.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is there and is no socket", path)
	}
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		conn.Close()
		return fmt.Errorf("another process serves %s", path)
	case errors.Is(err, unix.ECONNREFUSED):
		return os.Remove(path)
	default:
		return fmt.Errorf("%s may be in use: %w", path, err)
	}
}
