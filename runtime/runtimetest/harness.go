package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/workspaced/workspaced/runtime"
)

// Harness is what Conformance has to know of a driver.
type Harness struct {
	// New returns a world of the test's own, in which Image can be had and nothing
	// else exists. It is taken down when the test ends.
	New func(t *testing.T) *World

	// Image is one whose own command stays up, ends with code 0 on SIGTERM, and
	// needs no environment. Entrypoint, Cmd and Env are its configuration; it names
	// no user and no working directory.
	Image                string
	Entrypoint, Cmd, Env []string
	// MissingImage is one that can't be had; its registry, if any, says so.
	MissingImage string
	// NoCommandImage has neither entrypoint nor command.
	NoCommandImage string

	// Commands of Image, as Spec.Command takes them. Ignore stays up whatever
	// signal comes, but for SIGKILL; ExitWith ends at once with the code.
	Ignore   []string
	ExitWith func(code int) []string
	// These can't be executed: no such file, no program for lack of permission,
	// one for another architecture.
	NotFound, NotExecutable, WrongArchitecture []string
	// ExecFails passes Prepare, and execve refuses it all the same.
	ExecFails []string
	// User is a name that Image knows, with its ids; WorkingDir a directory other
	// than the root.
	User            string
	UserID, GroupID int
	WorkingDir      string
	MissingHostPath string                    // does not exist on the host
	HostPath        func(t *testing.T) string // makes a directory on the host
	Limits          runtime.Resources         // that this machine can enforce
	Skip            map[string]string         // properties that can't be tested here, by the subtest's name, and why
}

// World is a runtime with what the suite asks beside it, which sees into an
// instance without the runtime's help. A nil func skips the properties that
// need it.
type World struct {
	Runtime Runtime
	// Restart ends the daemon as SIGKILL would, calls down while there is none, and
	// returns the runtime of the next one.
	Restart func(t *testing.T, down func()) Runtime
	// SetPolicy sets the policy of the daemons that Restart begins; until then there
	// is one that allows everything.
	SetPolicy func(t *testing.T, p runtime.Policy)
	// Leaks describes all that is there of any instance and workspace, half made
	// things included; nothing once all was removed.
	Leaks func(t *testing.T) []string

	// Signal sends a running instance's first process a signal. The suite sends
	// SIGKILL only.
	Signal func(t *testing.T, in runtime.Instance, signal syscall.Signal)
	// Args, Env, WorkingDir and IDs are those of a running instance's first
	// process, Limits those of the instance.
	Args, Env  func(t *testing.T, in runtime.Instance) []string
	WorkingDir func(t *testing.T, in runtime.Instance) string
	IDs        func(t *testing.T, in runtime.Instance) (uid, gid int)
	Limits     func(t *testing.T, in runtime.Instance) runtime.Resources
	// ReadFile and WriteFile see a running instance's files, its mounts included;
	// an error wraps what the system says.
	ReadFile  func(t *testing.T, in runtime.Instance, name string) (string, error)
	WriteFile func(t *testing.T, in runtime.Instance, name, data string) error
	// AddForeign adds a container of another daemon, or of none when instanceUID is
	// empty, beside those of the runtime.
	AddForeign func(t *testing.T, instanceUID string) (remove func())
	// HasLog reports whether the workspace has a log.
	HasLog func(t *testing.T, workspaceID string) bool
}

// deadline bounds everything that the suite waits for.
const deadline = 30 * time.Second

// suite is one test of the suite, with a world of its own.
type suite struct {
	*testing.T
	h     Harness
	w     *World
	r     Runtime
	ctx   context.Context
	names map[[2]string]bool // id, uid of the workspaces
}

// newSuite returns a test whose world must be empty again once its instances and
// workspaces have been removed.
func newSuite(t *testing.T, h Harness) *suite {
	t.Helper()
	w := h.New(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*deadline)
	s := &suite{T: t, h: h, w: w, r: w.Runtime, ctx: ctx, names: make(map[[2]string]bool)}
	t.Cleanup(func() {
		defer cancel()
		s.removeAll()
		s.wantNoLeaks()
	})
	s.ensure(h.Image)
	return s
}

// removeAll removes every instance and workspace.
func (s *suite) removeAll() {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	list, err := s.r.List(ctx, "")
	if err != nil {
		s.Errorf("List: %v", err)
	}
	for _, in := range list {
		if err := s.r.Remove(ctx, in.ID); err != nil {
			s.Errorf("Remove(%s), %s: %v", in.ID, in.Phase, err)
		}
	}
	for name := range s.names {
		if err := s.r.RemoveWorkspace(ctx, name[0], name[1], false); err != nil {
			s.Errorf("RemoveWorkspace(%s, %s): %v", name[0], name[1], err)
		}
	}
	if list, err = s.r.List(ctx, ""); err != nil || len(list) != 0 {
		s.Errorf("List after everything was removed = %v, %v", list, err)
	}
}

// wantNoLeaks looks for what is left once everything was removed.
func (s *suite) wantNoLeaks() {
	s.Helper()
	if s.w.Leaks == nil {
		return
	}
	if leaks := s.w.Leaks(s.T); len(leaks) != 0 {
		s.Errorf("after everything was removed there is still: %q", leaks)
	}
}

// need skips the test when the harness lacks something.
func (s *suite) need(what string, has bool) {
	s.Helper()
	if !has {
		s.Skipf("NOT TESTED: the harness has no %s", what)
	}
}

func (s *suite) ensure(ref string) string {
	s.Helper()
	digest, err := s.r.EnsureImage(s.ctx, ref)
	if err != nil {
		s.Fatalf("EnsureImage(%s): %v", ref, err)
	}
	return digest
}

// spec returns a spec of the good image for a workspace.
func (s *suite) spec(id string, generation int64) runtime.Spec {
	return runtime.Spec{
		WorkspaceID: id, WorkspaceUID: "uid-" + id, Generation: generation, Image: s.h.Image,
	}
}

func (s *suite) prepare(spec runtime.Spec) runtime.Instance {
	s.Helper()
	s.names[[2]string{spec.WorkspaceID, spec.WorkspaceUID}] = true
	in, err := s.r.Prepare(s.ctx, spec)
	if err != nil {
		s.Fatalf("Prepare(generation %d of %s): %v", spec.Generation, spec.WorkspaceID, err)
	}
	return in
}

func (s *suite) start(id string, launch runtime.Launch) runtime.Instance {
	s.Helper()
	in, err := s.r.Start(s.ctx, id, launch)
	if err != nil {
		s.Fatalf("Start(%s): %v", id, err)
	}
	return in
}

// run prepares and starts.
func (s *suite) run(spec runtime.Spec) runtime.Instance {
	s.Helper()
	return s.start(s.prepare(spec).ID, runtime.Launch{Generation: spec.Generation})
}

func (s *suite) stop(id string) {
	s.Helper()
	if err := s.r.Stop(s.ctx, id, syscall.SIGTERM, deadline/2); err != nil {
		s.Fatalf("Stop(%s): %v", id, err)
	}
}

func (s *suite) remove(id string) {
	s.Helper()
	if err := s.r.Remove(s.ctx, id); err != nil {
		s.Fatalf("Remove(%s): %v", id, err)
	}
}

func (s *suite) wait(id string) runtime.Exit {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, deadline)
	defer cancel()
	exit, err := Wait(ctx, s.r, id)
	if err != nil {
		s.Fatalf("Wait(%s): %v", id, err)
	}
	return exit
}

func (s *suite) list(uid string) []runtime.Instance {
	s.Helper()
	list, err := s.r.List(s.ctx, uid)
	if err != nil {
		s.Fatalf("List(%q): %v", uid, err)
	}
	return list
}

// get returns what List says of an instance.
func (s *suite) get(id string) (runtime.Instance, bool) {
	s.Helper()
	list := s.list("")
	i := slices.IndexFunc(list, func(in runtime.Instance) bool { return in.ID == id })
	if i < 0 {
		return runtime.Instance{}, false
	}
	return list[i], true
}

// wantPhase checks that List knows the instance in one of the phases.
func (s *suite) wantPhase(id string, phases ...runtime.Phase) runtime.Instance {
	s.Helper()
	in, ok := s.get(id)
	switch {
	case !ok:
		s.Errorf("List has no instance %s, want it %v", id, phases)
	case !slices.Contains(phases, in.Phase):
		s.Errorf("instance %s is %v, want %v", id, in.Phase, phases)
	}
	return in
}

// wantNeverStarts checks what must hold of an instance once Start has failed:
// nothing runs and nothing can be started.
func (s *suite) wantNeverStarts(id string) {
	s.Helper()
	if in, ok := s.get(id); ok && in.Phase != runtime.PhaseRemnant && in.Phase != runtime.PhaseExited {
		s.Errorf("instance %s is %v after Start failed, want it remnant, exited or gone", id, in.Phase)
	}
}

// wantReason checks an error's type and what it says.
func (s *suite) wantReason(err error, reason runtime.Reason, permanent bool) {
	s.Helper()
	var e *runtime.Error
	switch {
	case !errors.As(err, &e):
		s.Errorf("error = %v, want a *runtime.Error with reason %s", err, reason)
	case e.Reason != reason:
		s.Errorf("error = %v, want reason %s", err, reason)
	case e.Permanent != permanent:
		s.Errorf("error %v has Permanent = %t, want %t", err, e.Permanent, permanent)
	case e.Message == "":
		s.Errorf("error %v has no message", err)
	}
}

// wantSame checks that List says of a running instance what Start said.
func (s *suite) wantSame(want runtime.Instance) {
	s.Helper()
	got, _ := s.get(want.ID)
	if !got.StartTime.Equal(want.StartTime) {
		s.Errorf("instance %s has start time %v, want %v", want.ID, got.StartTime, want.StartTime)
	}
	got.StartTime = want.StartTime
	if g, w := fmt.Sprintf("%+v", got), fmt.Sprintf("%+v", want); g != w {
		s.Errorf("List says\n%s\nwant\n%s", g, w)
	}
}

// difference compares two environments, whose order means nothing.
func difference(want, got []string) string {
	want, got = slices.Sorted(slices.Values(want)), slices.Sorted(slices.Values(got))
	var d []string
	for _, kv := range want {
		if !slices.Contains(got, kv) {
			d = append(d, fmt.Sprintf("lacks %.60q", kv))
		}
	}
	for _, kv := range got {
		if !slices.Contains(want, kv) {
			d = append(d, fmt.Sprintf("has %.60q", kv))
		}
	}
	if d == nil && len(want) != len(got) {
		d = append(d, fmt.Sprintf("has %d variables, want %d", len(got), len(want)))
	}
	return strings.Join(d, ", ")
}
