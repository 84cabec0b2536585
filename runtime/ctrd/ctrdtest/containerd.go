// Package ctrdtest has what tests of the containerd driver, and end-to-end
// tests, need: private containerds, images built offline, registries, and a
// search for what was left behind.
package ctrdtest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// Versions of containerd.
const (
	System = "system" // the machine's own
	V23    = "2.3"    // daemon and shim from $WORKSPACED_BIN_DIR/containerd-2.3
)

// Containerd is a daemon of a test's own, with its own root, state and socket.
type Containerd struct {
	// Version is what StartContainerd was asked for.
	Version string
	// Address is its socket.
	Address string
	// Dir holds everything: root/, state/, config.toml, log, socket.
	Dir string

	binDir string // empty: PATH
	cmd    *exec.Cmd
	exited chan struct{}
}

const patience = 30 * time.Second

// StartContainerd starts one, which ends with the test together with its shims,
// containers and mounts. Where there can't be one the test is skipped.
func StartContainerd(tb testing.TB, version string) *Containerd {
	tb.Helper()
	if os.Getuid() != 0 {
		tb.Skip("NOT TESTED: real containerd needs root")
	}
	c := &Containerd{Version: version}
	switch version {
	case System:
		for _, name := range []string{"containerd", "containerd-shim-runc-v2"} {
			if _, err := exec.LookPath(name); err != nil {
				tb.Skipf("NOT TESTED: %v", err)
			}
		}
	case V23:
		c.binDir = filepath.Join(os.Getenv("WORKSPACED_BIN_DIR"), "containerd-2.3")
		if _, err := os.Stat(filepath.Join(c.binDir, "containerd")); err != nil || !filepath.IsAbs(c.binDir) {
			tb.Skip("NOT TESTED: no containerd 2.3 in $WORKSPACED_BIN_DIR/containerd-2.3; make containerd23 builds it")
		}
	default:
		tb.Fatalf("containerd version %q", version)
	}
	if _, err := exec.LookPath("runc"); err != nil {
		tb.Skipf("NOT TESTED: %v", err)
	}
	// Not tb.TempDir: that is too long for a socket's address.
	dir, err := os.MkdirTemp("", "ctrd")
	if err != nil {
		tb.Fatal(err)
	}
	// In its state directory, as at users'.
	c.Dir, c.Address = dir, filepath.Join(dir, "state", "c.sock")
	tb.Cleanup(func() { c.cleanup(tb) })
	c.writeConfig(tb)
	c.Start(tb)
	return c
}

func (c *Containerd) writeConfig(tb testing.TB) {
	tb.Helper()
	config := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.restart",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.nri.v1.nri",
]
[grpc]
  address = %q
`, filepath.Join(c.Dir, "root"), filepath.Join(c.Dir, "state"), c.Address)
	if err := os.WriteFile(filepath.Join(c.Dir, "config.toml"), []byte(config), 0o600); err != nil {
		tb.Fatal(err)
	}
}

// Start starts the daemon, also again after Kill, and waits until it serves.
func (c *Containerd) Start(tb testing.TB) {
	tb.Helper()
	log, err := os.OpenFile(filepath.Join(c.Dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		tb.Fatal(err)
	}
	defer log.Close()
	// Not tied to a context: only Kill ends it.
	c.cmd = exec.Command(filepath.Join(c.binDir, "containerd"), "--config", filepath.Join(c.Dir, "config.toml"))
	if c.binDir != "" {
		c.cmd.Env = append(os.Environ(), "PATH="+c.binDir+":"+os.Getenv("PATH"))
	} else {
		c.cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/usr/bin")
	}
	c.cmd.Stdout, c.cmd.Stderr = log, log
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.cmd.Start(); err != nil {
		tb.Fatalf("containerd: %v", err)
	}
	cmd, exited := c.cmd, make(chan struct{})
	c.exited = exited
	go func() {
		defer close(exited)
		_ = cmd.Wait() // it is killed
	}()

	cl := c.client(tb)
	defer cl.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		if serving, err := cl.IsServing(ctx); err == nil && serving {
			return
		}
		select {
		case <-ctx.Done():
			tb.Fatalf("containerd does not serve:\n%s", c.Log())
		case <-exited:
			tb.Fatalf("containerd ended:\n%s", c.Log())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Kill ends the daemon with SIGKILL. Its shims and containers live on.
func (c *Containerd) Kill(tb testing.TB) {
	tb.Helper()
	_ = c.cmd.Process.Kill() // it may have ended
	select {
	case <-c.exited:
	case <-time.After(patience):
		tb.Fatal("containerd does not end")
	}
}

// Terminate ends the daemon with SIGTERM, as a service manager does. Its shims and
// containers live on.
func (c *Containerd) Terminate(tb testing.TB) {
	tb.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		tb.Fatal(err)
	}
	select {
	case <-c.exited:
	case <-time.After(patience):
		tb.Fatal("containerd does not end")
	}
}

// Reboot is what a reboot of the machine does to the daemon: no process of it is
// left, and nothing that was in /run or mounted; what is on the disk stays. What
// down does happens meanwhile.
func (c *Containerd) Reboot(tb testing.TB, down func()) {
	tb.Helper()
	c.crash(tb)
	UnmountBelow(tb, filepath.Join(c.Dir, "state"))
	if err := os.RemoveAll(filepath.Join(c.Dir, "state")); err != nil {
		tb.Fatal(err)
	}
	down()
	c.Start(tb)
}

// crash ends the daemon, its shims and their containers, and removes the shims'
// sockets.
func (c *Containerd) crash(tb testing.TB) {
	tb.Helper()
	c.Kill(tb)
	// Shims that are killed leave theirs.
	var sockets []string
	files, _ := filepath.Glob(filepath.Join(c.Dir, "state", "*", "*", "*", "address"))
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil {
			sockets = append(sockets, strings.TrimPrefix(string(b), "unix://"))
		}
	}
	for _, shim := range c.Shims() {
		for _, child := range childrenOf(shim) {
			_ = unix.Kill(child, unix.SIGKILL)
		}
		_ = unix.Kill(shim, unix.SIGKILL)
	}
	Eventually(tb, "shims end", func() bool { return len(c.Shims()) == 0 })
	for _, path := range sockets {
		_ = os.Remove(path)
	}
}

// Log returns the last lines of the daemon's log.
func (c *Containerd) Log() string {
	b, err := os.ReadFile(filepath.Join(c.Dir, "log"))
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-8<<10):])
}

func (c *Containerd) client(tb testing.TB) *client.Client {
	tb.Helper()
	cl, err := client.New(c.Address)
	if err != nil {
		tb.Fatal(err)
	}
	return cl
}

// Client returns one for the namespace, which is closed with the test.
func (c *Containerd) Client(tb testing.TB, namespace string) *client.Client {
	tb.Helper()
	cl, err := client.New(c.Address, client.WithDefaultNamespace(namespace))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { cl.Close() })
	return cl
}

// Shims returns the pids of the daemon's shims.
func (c *Containerd) Shims() []int {
	var pids []int
	for _, pid := range processes() {
		args := commandLine(pid)
		i := slices.Index(args, "-address")
		if i >= 0 && i+1 < len(args) && args[i+1] == c.Address && strings.Contains(args[0], "containerd-shim") {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Inits returns the pids of the workspace-inits that the daemon's shims have
// started and that have not become a command.
func (c *Containerd) Inits() []int {
	var pids []int
	for _, shim := range c.Shims() {
		for _, pid := range childrenOf(shim) {
			if slices.Contains(commandLine(pid), handshake.InitPath) && !Ended(pid) {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// cleanup ends daemon, shims and their containers, and removes mounts and files.
func (c *Containerd) cleanup(tb testing.TB) {
	if tb.Failed() {
		tb.Logf("containerd %s says at its end:\n%s", c.Version, c.Log())
	}
	c.crash(tb)
	UnmountBelow(tb, c.Dir)
	if err := os.RemoveAll(c.Dir); err != nil {
		tb.Errorf("containerd's files: %v", err)
	}
}

// UnmountBelow unmounts everything at or below dir.
func UnmountBelow(tb testing.TB, dir string) {
	tb.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		tb.Fatal(err)
	}
	for _, m := range slices.Backward(mounts) {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
			tb.Errorf("unmounting %s: %v", m.Mountpoint, err)
		}
	}
}

// Eventually waits until the condition holds: for what real processes do, which
// tell nobody.
func Eventually(tb testing.TB, what string, condition func() bool) {
	tb.Helper()
	deadline := time.Now().Add(patience)
	for !condition() {
		if time.Now().After(deadline) {
			tb.Fatalf("after %v still not: %s", patience, what)
		}
		Pause()
	}
}

// Pause is the time between two looks at a real process.
func Pause() { <-time.After(2 * time.Millisecond) }

func processes() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func commandLine(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(b) == 0 {
		return []string{""}
	}
	return strings.Split(string(bytes.TrimRight(b, "\x00")), "\x00")
}

func childrenOf(parent int) []int {
	var pids []int
	for _, pid := range processes() {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
		if len(fields) > 1 && string(fields[1]) == strconv.Itoa(parent) {
			pids = append(pids, pid)
		}
	}
	return pids
}
