package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/workspaced/workspaced/cmd/internal/lab"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/store/seal/canary"
)

// canaries is a stage on which values are set by every route, and then looked for in
// every place. The routes are rows in canary_routes_test.go, the places in
// canary_places_test.go.
//
// The search proves itself: what is no secret has a canary too, the control, and has
// to be found in each place. It is in the workspaces' ids, in arguments, in the
// daemon's environment, in images.
type canaries struct {
	*stage
	values  *canary.Set
	search  canary.Search
	heard   *heard
	control string
	image   string // with the control in it, and a program /broken
	dir     string // of what this test writes itself
	watches sync.WaitGroup

	complained int // hits that were looked at
	ownFiles   int // of which are a workspace's own, in its files
}

// Names of values that are no secrets.
const (
	controlName = "control"
	// modelName is the model's: callers see it, and it is in the database, but it
	// goes to containers the secrets' way and to nobody else.
	modelName = "model"
)

// Promise 21: no secret that was ever set is in plaintext in any file that daemon,
// containerd, shims and runc wrote, in any answer or error, in any environment or
// command line, in whatever usual encoding. Debug logs, failures, crashes and core
// files are part of it.
func TestContract21_Canary(t *testing.T) {
	s := newCanaries(t)
	for _, r := range routes {
		s.take(r)
	}
	s.part("while all run", func() {
		s.look()
		s.lookAtProcesses()
	})
	for _, r := range interruptions {
		s.take(r)
	}
	s.part("after failures and kills", func() {
		s.askAll()
		s.lookAtAuditLog()
		s.look()
	})
	s.part("after a crash", func() {
		s.crash("a crash", false)
		s.look()
		s.lookAtFreePages()
	})
	s.part("the search finds it", func() {
		s.checkControls()
		s.checkCoreControl()
		s.heard.checkAllCalled(s.t)
	})
}

// part runs a part of the test.
func (s *canaries) part(name string, do func()) {
	outer := s.t
	defer func() { s.t = outer }()
	outer.Run(name, func(t *testing.T) {
		s.t = t
		do()
	})
}

// take takes one route.
func (s *canaries) take(r route) {
	s.part(r.name, func() {
		r.take(&ride{canaries: s, name: r.name, id: s.control + "-" + r.name})
	})
}

func newCanaries(t *testing.T) *canaries {
	s := &canaries{values: canary.New(), heard: newHeard(), dir: scratch(t)}
	s.control = s.values.Value(controlName)
	s.search.Set, s.search.Skip = s.values, skipRoots
	// What would make every core file there can be: inherited by all that is started.
	t.Setenv("GOTRACEBACK", "crash")
	t.Setenv("CANARY", s.control)
	unlimited(t, unix.RLIMIT_CORE)

	s.stage = newStageOpts(t, 4*time.Minute, lab.Options{
		Faults: true, Tmpfs: true,
		Args: []string{
			"--log-level=debug", "--runtime-binary=" + wrapRunc(t, s.dir), "--metrics-listen=" + filepath.Join(s.dir, "metrics.sock"),
			"--audit-copy=" + filepath.Join(s.dir, "audit.jsonl"),
		},
		DialOptions: []grpc.DialOption{grpc.WithStatsHandler(s.heard)},
	})
	s.image = s.pushImage()
	s.followEvents()
	ctx, cancel := context.WithCancel(s.ctx)
	t.Cleanup(func() { // before the daemon's end
		cancel()
		s.watches.Wait()
	})
	s.watch(ctx)
	return s
}

// unlimited takes away a limit of this process and of those that it starts.
func unlimited(t *testing.T, resource int) {
	t.Helper()
	var was unix.Rlimit
	if err := unix.Getrlimit(resource, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Setrlimit(resource, &was); err != nil {
			t.Error(err)
		}
	})
}

// wrapRunc makes a program that does what runc does, and writes down what it was
// called with: it is gone before anybody could look at it.
func wrapRunc(t *testing.T, dir string) string {
	t.Helper()
	script := fmt.Sprintf("#!/bin/sh\ncat /proc/$$/cmdline /proc/$$/environ >>%s\nexec runc \"$@\"\n", filepath.Join(dir, "runc.calls"))
	path := filepath.Join(dir, "runc")
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// followEvents writes what containerd tells whoever asks, until the daemon is killed.
func (s *canaries) followEvents() {
	out, err := os.Create(filepath.Join(s.dir, "containerd.events"))
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := exec.CommandContext(s.ctx, "ctr", "--address", s.Daemon.Containerd(), "events")
	cmd.Stdout = out
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may be gone with containerd
		_ = cmd.Wait()         // killed
		if err := out.Close(); err != nil {
			s.t.Error(err)
		}
	})
}

// watch receives all changes until the daemon or ctx ends.
func (s *canaries) watch(ctx context.Context) {
	s.t.Helper()
	stream, err := s.client().WatchWorkspaces(ctx, &workspacev1.WatchWorkspacesRequest{})
	if err != nil {
		s.t.Fatal(err)
	}
	s.watches.Go(func() {
		for err == nil {
			_, err = stream.Recv() // the stats handler has it
		}
	})
}

// ride is one route with a workspace of its own.
type ride struct {
	*canaries
	name, id string
}

// value makes a secret value.
func (r *ride) value(what string) string { return r.values.Value(r.name + ": " + what) }

// spec is the workspace's.
func (r *ride) spec() *workspacev1.WorkspaceSpec {
	spec := r.stage.spec(r.id)
	spec.Image = r.image
	spec.Args = []string{r.control}
	return spec
}

// create makes the workspace with secrets, keys and values in turn, and does not wait
// for it.
func (r *ride) create(secrets ...string) {
	r.t.Helper()
	r.createSpec(r.spec(), secrets...)
}

func (r *ride) createSpec(spec *workspacev1.WorkspaceSpec, secrets ...string) {
	r.t.Helper()
	req := &workspacev1.CreateWorkspaceRequest{WorkspaceId: r.id, Workspace: &workspacev1.Workspace{Spec: spec}}
	for pair := range slices.Chunk(secrets, 2) {
		req.Secrets = append(req.Secrets, secretText(pair[0], pair[1]))
	}
	if _, err := r.client().CreateWorkspace(r.ctx, req); err != nil {
		r.t.Fatal(err)
	}
}

// runs waits until a container has the newest values, keys and values in turn; empty:
// it does not have the key. Its program answers by then, and so hears signals.
func (r *ride) runs(values ...string) {
	r.t.Helper()
	r.sees(r.wait(r.id, 0), values...)
}

// sees checks what the program in the workspace's container has got, likewise.
func (r *ride) sees(w *workspacev1.Workspace, values ...string) {
	r.t.Helper()
	env := r.inside(r.id, w.ObservedGeneration)
	for pair := range slices.Chunk(values, 2) {
		if got := env[pair[0]]; got != pair[1] {
			r.t.Errorf("inside %s is %q, want %q: the test proves nothing", pair[0], got, pair[1])
		}
	}
}

// set sets a secret of the workspace.
func (r *ride) set(key, value string) int64 { return r.stage.set(r.id, key, value) }

// secret is a secret's name.
func (r *ride) secret(key string) string { return "workspaces/" + r.id + "/secrets/" + key }

func secretText(key, value string) *workspacev1.SecretValue {
	return &workspacev1.SecretValue{Key: key, Payload: &workspacev1.SecretValue_Text{Text: value}}
}

// crash ends the daemon while it holds a secret, as a fault of its own would, and
// reports whether the kernel has written a core file. This needs no look at where.
func (s *canaries) crash(what string, wantCore bool) (value string) {
	s.t.Helper()
	r := &ride{canaries: s, name: what, id: s.control + "-set"}
	value = r.value("in memory")
	r.wait(r.id, r.set("CRASH", value))
	r.set("CRASH", r.value("on its way"))
	if err := s.Daemon.Signal(syscall.SIGQUIT); err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(s.ctx, 30*time.Second)
	defer cancel()
	err := s.Daemon.WaitExit(ctx)
	exit := (*exec.ExitError)(nil)
	if !errors.As(err, &exit) {
		s.t.Fatalf("it did not crash: %v", err)
	}
	if status := exit.Sys().(syscall.WaitStatus); status.Signal() != syscall.SIGABRT || status.CoreDump() != wantCore {
		s.t.Errorf("ended by %v, core written: %v, want by SIGABRT, and %v", status.Signal(), status.CoreDump(), wantCore)
	}
	if err := s.Daemon.Kill(); err != nil {
		s.t.Fatal(err)
	}
	return value
}

// checkCoreControl lets the daemon write a core file, which the secret is in: without
// that, that there was none proves nothing.
func (s *canaries) checkCoreControl() {
	s.t.Helper()
	s.Daemon.Args = append(s.Daemon.Args, "--core-dumps")
	s.start()
	s.crash("a core file", true)
	if !s.coresBeside() {
		return
	}
	cores, err := filepath.Glob(filepath.Join(s.Daemon.Base, "core*"))
	if err != nil || len(cores) != 1 {
		s.t.Fatalf("core files %q, %v", cores, err)
	}
	search := canary.Search{Set: s.values}
	if err := search.File(cores[0]); err != nil {
		s.t.Fatal(err)
	}
	if !slices.ContainsFunc(search.Hits, func(h canary.Hit) bool { return h.Name == "a core file: in memory" }) {
		s.t.Errorf("the secret is not in the core file, of %d bytes: %v", search.Bytes, search.Hits)
	}
	if err := os.Remove(cores[0]); err != nil {
		s.t.Fatal(err)
	}
	s.start() // for purge, which asks containerd
}

// coresBeside reports whether the kernel writes core files to the working directory
// of the program. Elsewhere, or if a handler gets them, there is none to look into:
// that none was written is what the program's parent knows.
func (s *canaries) coresBeside() bool {
	s.t.Helper()
	pattern, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil {
		s.t.Fatal(err)
	}
	if p := strings.TrimSpace(string(pattern)); strings.ContainsAny(p, "/|@") {
		s.t.Logf("core files go to %q on this machine: none is looked into", p)
		return false
	}
	return true
}

// checkControls says in which places the control was not found.
func (s *canaries) checkControls() {
	s.t.Helper()
	s.t.Logf("searched %d files, %d MB with what is packed in them", s.search.Files, s.search.Bytes>>20)
	if s.ownFiles < 3 {
		s.t.Errorf("only %d secrets were found in workspaces' own files", s.ownFiles)
	}
	for _, p := range places {
		if p.name == coreFiles && !s.coresBeside() {
			continue
		}
		at := regexp.MustCompile(p.where)
		found := 0
		for _, h := range s.search.Hits {
			if strings.HasPrefix(h.Name, controlName) && at.MatchString(h.Where) {
				found++
			}
		}
		s.t.Logf("%-45s control found %d times", p.name, found)
		if found == 0 {
			s.t.Errorf("%s: even what is no secret was not found: they were not searched", p.name)
		}
	}
}
