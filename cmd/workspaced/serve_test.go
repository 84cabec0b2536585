package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/workspaced/workspaced/cmd/workspaced/internal/embedded"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// needContainers skips where no daemon can run.
func needContainers(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: the daemon needs root")
	}
	for _, program := range []string{"containerd", "runc"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip("SKIPPED, NOT TESTED: there is no " + program)
		}
	}
}

var buildInit = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("WORKSPACED_BIN_DIR"); dir != "" {
		return filepath.Join(dir, "workspace-init"), nil
	}
	dir, err := os.MkdirTemp("", "workspaced-bin-")
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-ldflags=-E=workspace_init_entry", "-o", dir, "github.com/workspaced/workspaced/cmd/workspace-init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return filepath.Join(dir, "workspace-init"), nil
})

func TestMain(m *testing.M) {
	if os.Getenv(asDaemon) != "" {
		os.Unsetenv(asDaemon)
		main()
		return
	}
	code := m.Run()
	if os.Getenv("WORKSPACED_BIN_DIR") == "" && os.Geteuid() == 0 {
		if path, err := buildInit(); err == nil {
			os.RemoveAll(filepath.Dir(path))
		}
	}
	os.Exit(code)
}

// instance is a daemon's place.
type instance struct {
	t    *testing.T
	base string
	args []string
}

// newInstance makes a place that is purged when the test ends.
func newInstance(t *testing.T) *instance {
	t.Helper()
	needContainers(t)
	initPath, err := buildInit()
	if err != nil {
		t.Fatal(err)
	}
	base, err := os.MkdirTemp("", "wsd-") // t.TempDir is too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	in := &instance{t: t, base: base}
	in.args = []string{"--data-dir", in.path("data"), "--state-dir", in.path("run"), "--private-containerd", "--init-path", initPath}
	t.Cleanup(func() {
		out, err := in.run(context.Background(), "purge", "--yes")
		if err != nil {
			t.Errorf("purge: %v\n%s", err, out)
		}
		for _, dir := range []string{"data", "run"} {
			if exists(in.path(dir)) {
				t.Errorf("purge left %s", in.path(dir))
			}
		}
		if err := os.RemoveAll(base); err != nil {
			t.Error(err)
		}
	})
	return in
}

func (in *instance) path(name string) string { return filepath.Join(in.base, name) }
func (in *instance) socket() string          { return in.path("run/workspaced.sock") }

// run runs a command of the daemon's program to its end.
func (in *instance) run(ctx context.Context, verb string, more ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var out syncBuffer
	err := run(ctx, append(append([]string{verb}, in.args...), more...), stdio{out: &out, err: &out})
	return out.String(), err
}

// syncBuffer is a bytes.Buffer for many goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// serving is a daemon that runs in this process.
type serving struct {
	*instance
	stop func() error // as by SIGTERM; returns what run returned
	log  *syncBuffer
	conn *grpc.ClientConn
}

// serve starts a daemon and returns when it serves.
func (in *instance) serve(more ...string) *serving {
	in.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s := &serving{instance: in, log: new(syncBuffer)}
	done := make(chan error, 1)
	go func() {
		done <- run(ctx, append(append([]string{"serve"}, in.args...), more...), stdio{out: s.log, err: s.log})
	}()
	s.stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	in.t.Cleanup(func() { _ = s.stop() })
	s.conn = in.dial("unix://" + in.socket())
	wait, end := context.WithTimeout(context.Background(), time.Minute)
	defer end()
	for {
		try, cancel := context.WithTimeout(wait, time.Second) // then look whether it lives
		resp, err := healthv1.NewHealthClient(s.conn).Check(try, &healthv1.HealthCheckRequest{}, grpc.WaitForReady(true))
		cancel()
		if resp.GetStatus() == healthv1.HealthCheckResponse_SERVING {
			return s
		}
		select {
		case err := <-done:
			done <- err
			in.t.Fatalf("daemon ended: %v\n%s", err, s.log)
		case <-wait.Done():
			in.t.Fatalf("daemon does not serve: %v\n%s", err, s.log)
		default:
		}
	}
}

func (in *instance) dial(target string) *grpc.ClientConn {
	in.t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second}))
	if err != nil {
		in.t.Fatal(err)
	}
	in.t.Cleanup(func() { conn.Close() })
	return conn
}

func mode(t *testing.T, path string) fs.FileMode {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Mode().Perm()
}

func TestServeFilesAndSockets(t *testing.T) {
	in := newInstance(t)
	notify := listenNotify(t, in.path("notify.sock"))
	s := in.serve("--listen=127.0.0.1:0", "--insecure", "--socket-group=12345")
	if got := <-notify; !strings.Contains(got, "READY=1") {
		t.Errorf("service manager was told %q, want READY=1", got)
	}
	for path, want := range map[string]fs.FileMode{
		"run/workspaced.sock": 0o660, "run": 0o750, "data": 0o700,
		"data/workspaced.key": 0o600, "data/workspaced.db": 0o600, "data/containerd.log": 0o600,
	} {
		if got := mode(t, in.path(path)); got != want {
			t.Errorf("%s has mode %o, want %o", path, got, want)
		}
	}
	for _, path := range []string{in.socket(), in.path("run")} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if gid := info.Sys().(*syscall.Stat_t).Gid; gid != 12345 {
			t.Errorf("%s belongs to group %d, want 12345", path, gid)
		}
	}
	if err := s.stop(); err != nil {
		t.Errorf("serve returned %v", err)
	}
	if got := <-notify; !strings.Contains(got, "STOPPING=1") {
		t.Errorf("service manager was told %q, want STOPPING=1", got)
	}
	if exists(in.socket()) {
		t.Error("the socket is still there")
	}
}

// listenNotify is a service manager.
func listenNotify(t *testing.T, path string) <-chan string {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", path)
	messages := make(chan string, 10)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(messages)
		buf := make([]byte, 4096)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			select {
			case messages <- string(buf[:n]):
			default: // nobody reads them any more
			}
		}
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
	})
	return messages
}

func TestServeListensOnTCP(t *testing.T) {
	in := newInstance(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	in.serve("--listen="+address, "--insecure")
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	resp, err := healthv1.NewHealthClient(in.dial(address)).Check(ctx, &healthv1.HealthCheckRequest{}, grpc.WaitForReady(true))
	if err != nil || resp.Status != healthv1.HealthCheckResponse_SERVING {
		t.Errorf("health over TCP: %v, %v", resp, err)
	}
	// Every user and container of the machine can connect there.
	_, err = workspacev1.NewWorkspaceControlClient(in.dial(address)).ListWorkspaces(ctx, &workspacev1.ListWorkspacesRequest{})
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("without a token or binding: got %v, want PermissionDenied", err)
	}
}

// A drain ends watches, says NOT_SERVING, and does not wait for clients that
// stay connected.
func TestServeDrains(t *testing.T) {
	in := newInstance(t)
	s := in.serve()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	client := workspacev1.NewWorkspaceControlClient(s.conn)
	watch, err := client.WatchWorkspaces(ctx, &workspacev1.WatchWorkspacesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if event, err := watch.Recv(); err != nil || event.GetSynced() == nil {
		t.Fatalf("watch begins with %v, %v", event, err)
	}
	health, err := healthv1.NewHealthClient(s.conn).Watch(ctx, &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := health.Recv(); err != nil || resp.Status != healthv1.HealthCheckResponse_SERVING {
		t.Fatalf("health is %v, %v", resp, err)
	}
	began := time.Now()
	if err := s.stop(); err != nil {
		t.Errorf("serve returned %v\n%s", err, s.log)
	}
	if log := s.log.String(); !strings.Contains(log, "stopped") || strings.Contains(log, "<nil>") {
		t.Errorf("log:\n%s", log)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("the drain took %v: it waited for its timeout", took)
	}
	if _, err := watch.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the watch ended with %v, want UNAVAILABLE", err)
	}
	if resp, err := health.Recv(); err != nil || resp.Status != healthv1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health went to %v, %v, want NOT_SERVING", resp, err)
	}
}

// What can't be started is refused in one sentence, and nothing is changed.
func TestServeRefuses(t *testing.T) {
	in := newInstance(t)
	s := in.serve()
	refused := func(t *testing.T, want string, args ...string) {
		t.Helper()
		out, err := in.run(context.Background(), "serve", args...)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("error %q, want one line with %q\n%s", err, want, out)
		}
	}
	// Nothing is started or made before it is noticed.
	refusedAtOnce := func(t *testing.T, want string, args ...string) {
		t.Helper()
		fresh := []string{"--data-dir=" + in.path("fresh-data"), "--state-dir=" + in.path("fresh")}
		refused(t, want, append(args, fresh...)...)
		if exists(in.path("fresh-data")) || exists(in.path("fresh")) {
			t.Error("a directory was made")
		}
	}
	t.Run("second daemon, same state", func(t *testing.T) {
		refused(t, fmt.Sprintf("another workspaced (pid %d) runs", os.Getpid()), "--data-dir="+in.path("other-data"))
	})
	t.Run("second daemon, same database", func(t *testing.T) {
		refused(t, "in use", "--state-dir="+in.path("r2"))
	})
	t.Run("purge of a running daemon", func(t *testing.T) {
		if out, err := in.run(context.Background(), "purge", "--yes"); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("another workspaced (pid %d) runs", os.Getpid())) {
			t.Errorf("purge: %v\n%s", err, out)
		}
	})
	t.Run("still serving", func(t *testing.T) {
		resp, err := healthv1.NewHealthClient(s.conn).Check(context.Background(), &healthv1.HealthCheckRequest{})
		if err != nil || resp.Status != healthv1.HealthCheckResponse_SERVING {
			t.Errorf("the first daemon was hurt: %v, %v", resp, err)
		}
	})
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"other-data", "r2"} {
		if err := os.RemoveAll(in.path(dir)); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("socket of another process", func(t *testing.T) {
		path := in.path("taken.sock")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		refused(t, "another process serves", "--socket="+path)
	})
	t.Run("socket is a file", func(t *testing.T) {
		path := in.path("file")
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, "no socket", "--socket="+path)
		if data, err := os.ReadFile(path); err != nil || string(data) != "precious" {
			t.Errorf("the file is %q, %v", data, err)
		}
	})
	t.Run("no containerd there", func(t *testing.T) {
		refused(t, "no such file", "--private-containerd=false", "--containerd="+in.path("nobody.sock"))
	})
	t.Run("no containerd program", func(t *testing.T) {
		refused(t, "--containerd-binary", "--containerd-binary=no-such-program")
	})
	t.Run("no init", func(t *testing.T) {
		refusedAtOnce(t, "init_path", "--init-path="+in.path("no-init"))
	})
	t.Run("no image", func(t *testing.T) {
		refusedAtOnce(t, "import_images", "--import-images="+in.path("none.tar"))
	})
	t.Run("image is a directory", func(t *testing.T) {
		refusedAtOnce(t, "is a directory", "--import-images="+in.base)
	})
	t.Run("no certificate", func(t *testing.T) {
		refusedAtOnce(t, "registry_ca_files", "--registry-ca-files="+in.path("none.pem"))
	})
	t.Run("no group", func(t *testing.T) {
		refused(t, "socket_group", "--socket-group=no-such-group")
	})
	t.Run("bindings", func(t *testing.T) {
		refusedAtOnce(t, "bindings: \"insecure boss\"", "--bindings=unix:socket-group admin,insecure boss")
	})
	t.Run("TLS files", func(t *testing.T) {
		refusedAtOnce(t, "tls: open "+in.path("none.pem"), "--listen=127.0.0.1:1", "--tls-cert-file="+in.path("none.pem"), "--tls-key-file=/k", "--tls-client-ca-file=/a")
	})
	t.Run("and then it starts", func(t *testing.T) {
		// A stale socket is in nobody's way.
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: in.socket(), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		in := &instance{t: t, base: in.base, args: in.args}
		if err := in.serve().stop(); err != nil {
			t.Error(err)
		}
	})
}

// SIGTERM while it starts ends it, and is no error.
func TestServeStoppedWhileStarting(t *testing.T) {
	in := newInstance(t)
	slow := in.path("slow-containerd")
	if err := os.WriteFile(slow, []byte("#!/bin/sh\necho up >"+in.path("up")+"\nexec sleep 600\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	var out syncBuffer
	go func() {
		args := append([]string{"serve", "--containerd-binary", slow}, in.args...)
		done <- run(ctx, args, stdio{out: &out, err: &out})
	}()
	deadline, end := context.WithTimeout(context.Background(), time.Minute)
	defer end()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !exists(in.path("up")) {
		select {
		case <-tick.C:
		case <-deadline.Done():
			t.Fatal("it does not even start")
		}
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("%v\n%s", err, &out)
		}
	case <-deadline.Done():
		t.Fatalf("does not end\n%s", &out)
	}
}

// A containerd that was used once is used again, whatever is found later: else
// every workspace would run twice.
func TestContainerdIsRemembered(t *testing.T) {
	in := newInstance(t)
	if err := in.serve().stop(); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(in.path("data/containerd.address")); err != nil || string(got) != "private\n" {
		t.Errorf("remembered %q, %v", got, err)
	}
	// The machine's own one comes, in the file's place: one that does not answer.
	if err := os.WriteFile(in.path("data/containerd.address"), []byte(in.path("gone.sock")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := in.run(context.Background(), "serve", "--private-containerd=false")
	if err == nil || !strings.Contains(err.Error(), in.path("gone.sock")) {
		t.Errorf("serve: %v, want that it asks for the one it had\n%s", err, out)
	}
}

func TestRunCommands(t *testing.T) {
	do := func(args ...string) (string, error) {
		var out syncBuffer
		err := run(context.Background(), args, stdio{out: &out, err: &out, environ: []string{"WORKSPACED_DATA_DIR=/from/env"}})
		return out.String(), err
	}
	if out, err := do("version"); err != nil || !strings.HasPrefix(out, "workspaced ") {
		t.Errorf("version: %q, %v", out, err)
	}
	long, _ := do("version")
	if out, err := do("--version"); err != nil || out != long {
		t.Errorf("--version: %q, %v; version says %q", out, err, long)
	}
	if out, err := do("purge", "--help"); err != nil || !strings.Contains(out, "--data-dir") || strings.Contains(out, "--drain-timeout") {
		t.Errorf("help of purge: %q, %v", out, err)
	}
	if _, err := do("purge", "--drain-timeout=5s", "--data-dir=/precious"); err == nil || !strings.Contains(err.Error(), "--yes") {
		t.Errorf("purge with a flag of serve's: %v", err)
	}
	if out, err := do("serve", "--print-config", "--state-dir=/s"); err != nil || !strings.Contains(out, "data_dir: /from/env\n") || !strings.Contains(out, "socket: /s/workspaced.sock\n") {
		t.Errorf("print-config: %q, %v", out, err)
	}
	if out, err := do("serve", "--help"); err != nil || !strings.Contains(out, "--drain-timeout") {
		t.Errorf("help: %q, %v", out, err)
	}
	for _, args := range [][]string{{"serve", "--no-such-flag"}, {"serve", "extra"}, {"dance"}, {"serve", "--listen=:80", "--insecure"}} {
		if out, err := do(args...); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v: error %v, output %q", args, err, out)
		}
	}
	if _, err := do("purge", "--data-dir=/precious"); err == nil || !strings.Contains(err.Error(), "--yes") || !strings.Contains(err.Error(), "/precious") {
		t.Errorf("purge without --yes: %v", err)
	}
}

func TestPurgeOfNothing(t *testing.T) {
	needContainers(t)
	dir := t.TempDir()
	var out syncBuffer
	args := []string{"purge", "--yes", "--data-dir", filepath.Join(dir, "d"), "--state-dir", filepath.Join(dir, "s")}
	if err := run(context.Background(), args, stdio{out: &out, err: &out}); err != nil || !strings.Contains(out.String(), "nothing to remove") {
		t.Errorf("%v, %q", err, &out)
	}
	if exists(filepath.Join(dir, "d")) || exists(filepath.Join(dir, "s")) {
		t.Error("purge made directories")
	}
}

// Files of others in the directories stay.
func TestPurgeKeepsForeignFiles(t *testing.T) {
	in := newInstance(t)
	if err := in.serve().stop(); err != nil {
		t.Fatal(err)
	}
	foreign := in.path("data/somebody-elses")
	for _, path := range []string{foreign, in.path("data/.workspaced.db.compact"), in.path("data/.workspaced.key.123")} { // crashes leave the others
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := in.run(context.Background(), "purge", "--yes")
	if err != nil || !exists(foreign) || !strings.Contains(out, "kept "+in.path("data")) {
		t.Errorf("%v, still there: %v\n%s", err, exists(foreign), out)
	}
	if left, err := os.ReadDir(in.path("data")); err != nil || len(left) != 1 || exists(in.path("run")) {
		t.Errorf("something of ours is left: %v, %v", left, err)
	}
	if err := os.Remove(foreign); err != nil {
		t.Error(err)
	}
}

func TestStopSignals(t *testing.T) {
	var log syncBuffer
	_, logger, err := configure(serveCommand(stdio{}), stdio{err: &log})
	if err != nil {
		t.Fatal(err)
	}
	soft, hard, release := stopSignals(context.Background(), logger)
	defer release()
	self := os.Getpid()
	deadline, end := context.WithTimeout(context.Background(), 20*time.Second)
	defer end()
	for _, step := range []struct {
		name string
		ctx  context.Context
	}{{"first", soft}, {"second", hard}} {
		if step.ctx.Err() != nil {
			t.Fatalf("ended before the %s signal", step.name)
		}
		if err := syscall.Kill(self, syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		select {
		case <-step.ctx.Done():
		case <-deadline.Done():
			t.Fatalf("the %s signal has no effect", step.name)
		}
	}
}

// Nobody can read the database any more, and a container still runs.
func TestPurgeWithoutDatabase(t *testing.T) {
	for name, breakIt := range map[string]func(db string) error{
		"missing": os.Remove,
		"damaged": func(db string) error { return os.WriteFile(db, []byte("rubbish"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			in := newInstance(t)
			if err := in.serve().stop(); err != nil {
				t.Fatal(err)
			}
			// What a shim with its container looks like; until the child is another
			// program it looks like one more.
			const script = `sleep 600 & while [ "$(cat /proc/$!/comm)" != sleep ]; do :; done; echo up; wait; true`
			shim := exec.Command("/bin/sh", "-c", script, "shim", "-address", in.path("run/containerd/containerd.sock"))
			shim.Dir = in.path("run")
			out, err := shim.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := shim.Start(); err != nil {
				t.Fatal(err)
			}
			if _, err := out.Read(make([]byte, 3)); err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				_, _ = out.Read(make([]byte, 1)) // until its child has ended too
				_ = shim.Wait()                  // it is ended by a signal
			}()
			if err := breakIt(in.path("data/workspaced.db")); err != nil {
				t.Fatal(err)
			}
			text, err := in.run(context.Background(), "purge", "--yes")
			if err != nil || !strings.Contains(text, "1 containers") {
				t.Errorf("purge: %v\n%s", err, text)
			}
			timeout := time.NewTimer(20 * time.Second)
			defer timeout.Stop()
			select {
			case <-ended:
			case <-timeout.C:
				t.Error("the shim, or its child, lives on")
				_ = shim.Process.Kill()
			}
		})
	}
}

// A containerd that was given is used, and left alone by stop and purge.
func TestServeOnGivenContainerd(t *testing.T) {
	in := newInstance(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	given, err := embedded.Start(ctx, embedded.Config{Root: in.path("c-root"), State: in.path("c"), LogFile: in.path("c.log")})
	if err != nil {
		t.Fatal(err)
	}
	defer given.Close(context.Background())
	in.args = append(in.args, "--private-containerd=false", "--containerd", "unix://"+given.Address())
	s := in.serve()
	if exists(in.path("run/containerd")) {
		t.Error("a private containerd was started")
	}
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	if out, err := in.run(ctx, "purge", "--yes"); err != nil {
		t.Errorf("purge: %v\n%s", err, out)
	}
	if !embedded.Answers(ctx, given.Address()) {
		t.Error("the given containerd does not answer any more")
	}
}
