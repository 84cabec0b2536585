// Package e2e tests workspaced from outside: real processes, real containers.
// It needs root and containerd.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/workspaced/workspaced/cmd/internal/lab"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// binDir has the programs under test.
var binDir string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	if missing := missing(); missing != "" {
		fmt.Fprintf(os.Stderr, "=== END-TO-END TESTS ARE NOT RUN: %s ===\n", missing)
		os.Exit(m.Run()) // each test skips
	}
	binDir = os.Getenv("WORKSPACED_BIN_DIR")
	if binDir == "" {
		dir, err := os.MkdirTemp("", "workspaced-bin-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		if err := build(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		binDir = dir
	}
	return m.Run()
}

// missing says what this machine lacks for these tests.
func missing() string {
	if os.Geteuid() != 0 {
		return "they need root"
	}
	for _, program := range []string{"containerd", "runc", "ctr"} {
		if _, err := exec.LookPath(program); err != nil {
			return "there is no " + program
		}
	}
	return ""
}

func build(dir string) error {
	for _, pkg := range []string{"workspaced", "workspace-init", "demo", "demo/envserver"} {
		flags := ""
		if pkg == "workspace-init" {
			flags = "-E=workspace_init_entry"
		}
		cmd := exec.Command("go", "build", "-ldflags="+flags, "-o", dir, "github.com/workspaced/workspaced/cmd/"+pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("building %s: %w\n%s", pkg, err, out)
		}
	}
	cmd := exec.Command("go", "build", "-tags", "faults", "-o", filepath.Join(dir, lab.FaultsProgram), "github.com/workspaced/workspaced/cmd/workspaced")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w\n%s", lab.FaultsProgram, err, out)
	}
	return nil
}

// onEach runs a test on the machine's containerd, and a short one on the newer
// one that make builds beside the programs.
func onEach(t *testing.T, timeout time.Duration, test func(t *testing.T, s *stage, short bool)) {
	t.Run("installed", func(t *testing.T) { test(t, newStage(t, timeout), testing.Short()) })
	t.Run("containerd-2.3", func(t *testing.T) {
		test(t, newStageWith(t, timeout, newerContainerd(t)), true)
	})
}

// newerContainerd is the directory of the containerd that make builds beside the
// programs. Where it is not, the test is skipped.
func newerContainerd(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs(filepath.Join(binDir, "containerd-2.3"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "containerd")); err != nil {
		t.Skip("SKIPPED, NOT TESTED: containerd 2.3 is not built: make containerd23")
	}
	return dir
}

// stage is a lab.Stage in a test.
type stage struct {
	*lab.Stage
	t   *testing.T
	ctx context.Context
}

// newStage starts a daemon with the flags, to be removed with all it made when
// the test ends: what is left is a failure.
func newStage(t *testing.T, timeout time.Duration, args ...string) *stage {
	t.Helper()
	return newStageWith(t, timeout, "", args...)
}

// newStageWith is newStage with a directory before the daemon's PATH.
func newStageWith(t *testing.T, timeout time.Duration, path string, args ...string) *stage {
	t.Helper()
	return newStageOpts(t, timeout, lab.Options{Args: args, Path: path})
}

// newStageOpts is newStage with any options but where the programs are.
func newStageOpts(t *testing.T, timeout time.Duration, opts lab.Options) *stage {
	t.Helper()
	if why := missing(); why != "" {
		t.Skip("SKIPPED, NOT TESTED: " + why)
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	opts.BinDir, opts.Group = binDir, -1
	s, err := lab.NewStage(opts)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer cancel()
		if t.Failed() {
			t.Logf("daemon's log:\n%s\ncontainerd's log:\n%s", s.Daemon.LogTail(), s.Daemon.ContainerdLogTail())
		}
		if err := s.Close(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	})
	st := &stage{Stage: s, t: t, ctx: ctx}
	st.start()
	return st
}

func (s *stage) start() {
	s.t.Helper()
	if err := s.Daemon.Start(s.ctx); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stage) client() workspacev1.WorkspaceControlClient { return s.Daemon.Client() }

// spec is a workspace's that serves its environment on s.Socket(id).
func (s *stage) spec(id string) *workspacev1.WorkspaceSpec {
	return &workspacev1.WorkspaceSpec{
		Image: lab.DemoImage,
		Env:   map[string]string{"ENVSERVER_SOCKET": "/demo/" + id + ".sock"},
		Volumes: []*workspacev1.Volume{{
			MountPath: "/demo",
			Source:    &workspacev1.Volume_HostPath{HostPath: s.VolumeDir},
		}},
	}
}

// create makes a workspace and waits until it runs.
func (s *stage) create(id string, secrets map[string]string) *workspacev1.Workspace {
	s.t.Helper()
	req := &workspacev1.CreateWorkspaceRequest{WorkspaceId: id, Workspace: &workspacev1.Workspace{Spec: s.spec(id)}}
	for key, value := range secrets {
		req.Secrets = append(req.Secrets, &workspacev1.SecretValue{Key: key, Payload: &workspacev1.SecretValue_Text{Text: value}})
	}
	resp, err := s.client().CreateWorkspace(s.ctx, req)
	if err != nil {
		s.t.Fatal(err)
	}
	return s.wait(id, resp.Generation)
}

// wait waits for a generation of a workspace.
func (s *stage) wait(id string, generation int64) *workspacev1.Workspace {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	resp, err := s.client().WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{Name: "workspaces/" + id, Generation: generation})
	if err != nil {
		s.t.Fatalf("waiting for generation %d of %s: %v; it is %v", generation, id, err, s.get(id))
	}
	return resp.Workspace
}

func (s *stage) get(id string) *workspacev1.Workspace {
	s.t.Helper()
	resp, err := s.client().GetWorkspace(s.ctx, &workspacev1.GetWorkspaceRequest{Name: "workspaces/" + id})
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.Workspace
}

// set sets a secret and returns the generation.
func (s *stage) set(id, key, value string) int64 {
	s.t.Helper()
	resp, err := s.client().SetSecret(s.ctx, setSecret(id, key, value))
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.Generation
}

func setSecret(id, key, value string) *workspacev1.SetSecretRequest {
	return &workspacev1.SetSecretRequest{
		Name:    "workspaces/" + id + "/secrets/" + key,
		Payload: &workspacev1.SetSecretRequest_Text{Text: value},
	}
}

// inside returns the environment that the workspace's program of this
// generation sees.
func (s *stage) inside(id string, generation int64) map[string]string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, 20*time.Second)
	defer cancel()
	seen, err := lab.WaitInside(ctx, s.Socket(id), func(seen lab.Seen) bool {
		return seen.Env["WORKSPACE_GENERATION"] == fmt.Sprint(generation)
	})
	if err != nil {
		s.t.Fatalf("no program of generation %d of %s answers, the last was of %q: %v", generation, id, seen.Env["WORKSPACE_GENERATION"], err)
	}
	return seen.Env
}

// until waits for a state of the record.
func (s *stage) until(id, what string, ok func(*workspacev1.Workspace) bool) *workspacev1.Workspace {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	var last *workspacev1.Workspace
	s.poll(ctx, func() error {
		if last = s.get(id); !ok(last) {
			return fmt.Errorf("%s is not %s: %v", id, what, last)
		}
		return nil
	})
	return last
}

// gone waits until a workspace's deletion is done.
func (s *stage) gone(id string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	s.poll(ctx, func() error {
		_, err := s.client().GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: "workspaces/" + id})
		if status.Code(err) == codes.NotFound {
			return nil
		}
		if err == nil {
			err = errors.New("it is still there")
		}
		return fmt.Errorf("%s is not gone: %w", id, err)
	})
}

// kill sends a signal to a container's first process.
func (s *stage) kill(w *workspacev1.Workspace, signal unix.Signal) {
	s.t.Helper()
	if w.Pid <= 1 { // would be this process's group, or all there are
		s.t.Fatalf("no process to kill: %v", w)
	}
	if err := unix.Kill(int(w.Pid), signal); err != nil {
		s.t.Error(err)
	}
}

// poll asks a real process until it says nil.
func (s *stage) poll(ctx context.Context, ask func() error) {
	s.t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var last error // that is not the end of ctx alone
	for {
		err := ask()
		if err == nil {
			return
		}
		if last == nil || ctx.Err() == nil {
			last = err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			s.t.Fatal(errors.Join(ctx.Err(), last))
		}
	}
}

// settle checks that the machine has what so many running workspaces need, and
// nothing else.
func (s *stage) settle(workspaces int) lab.Inventory {
	s.t.Helper()
	return s.settleLike(workspaces, nil)
}

// settleLike is settle, and everything has to be as it was.
func (s *stage) settleLike(workspaces int, like *lab.Inventory) lab.Inventory {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, 30*time.Second)
	defer cancel()
	inv, err := s.Daemon.Settle(ctx, workspaces, like)
	if err != nil {
		s.t.Fatal(err)
	}
	return inv
}

// waitFor waits for a channel to be closed.
func (s *stage) waitFor(what string, c <-chan struct{}) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, 30*time.Second)
	defer cancel()
	select {
	case <-c:
	case <-ctx.Done():
		s.t.Fatalf("%s: %v", what, ctx.Err())
	}
}

// scratch is a directory for a test's own files, with a path that is short enough.
func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return filepath.Clean(dir)
}
