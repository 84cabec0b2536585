package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/workspaced/workspaced/cmd/internal/lab"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// policyCase is a workspace whose container ends by itself.
type policyCase struct {
	name    string
	env     map[string]string
	memory  int64
	policy  *workspacev1.CrashPolicy
	signal  unix.Signal // sent from outside once it runs
	state   workspacev1.WorkspaceState
	exit    *workspacev1.LastExit
	starts  int
	between time.Duration // at least, from the first start to the last
}

const (
	exited    = workspacev1.WorkspaceState_WORKSPACE_STATE_EXITED
	exhausted = workspacev1.WorkspaceState_WORKSPACE_STATE_EXHAUSTED
	always    = workspacev1.CrashRestart_CRASH_RESTART_ALWAYS
	onFailure = workspacev1.CrashRestart_CRASH_RESTART_ON_FAILURE
	never     = workspacev1.CrashRestart_CRASH_RESTART_NEVER
)

var policyCases = []policyCase{
	{
		name: "retries", env: map[string]string{"ENVSERVER_EXIT": "1"},
		policy: &workspacev1.CrashPolicy{Restart: onFailure, MaxRetries: 2},
		state:  exhausted, exit: &workspacev1.LastExit{Code: 1, CodeKnown: true}, starts: 3,
		between: 3 * 250 * time.Millisecond, // waits of 0.5 s and 1 s, less half of each
	},
	{
		name: "always", env: map[string]string{"ENVSERVER_EXIT": "0"},
		policy: &workspacev1.CrashPolicy{Restart: always, MaxRetries: 1},
		state:  exhausted, exit: &workspacev1.LastExit{Code: 0, CodeKnown: true}, starts: 2,
		between: 250 * time.Millisecond,
	},
	{
		name: "done", env: map[string]string{"ENVSERVER_EXIT": "0"},
		policy: &workspacev1.CrashPolicy{Restart: onFailure},
		state:  exited, exit: &workspacev1.LastExit{Code: 0, CodeKnown: true}, starts: 1,
	},
	{
		name: "never", env: map[string]string{"ENVSERVER_EXIT": "3"},
		policy: &workspacev1.CrashPolicy{Restart: never},
		state:  exited, exit: &workspacev1.LastExit{Code: 3, CodeKnown: true}, starts: 1,
	},
	{
		name: "oom", env: map[string]string{"ENVSERVER_ALLOCATE": "1"}, memory: 64 << 20,
		policy: &workspacev1.CrashPolicy{Restart: never},
		state:  exited, exit: &workspacev1.LastExit{Code: 137, CodeKnown: true, Signal: "SIGKILL", OomKilled: true}, starts: 1,
	},
	{
		name: "signal", signal: unix.SIGKILL,
		policy: &workspacev1.CrashPolicy{Restart: never},
		state:  exited, exit: &workspacev1.LastExit{Code: 137, CodeKnown: true, Signal: "SIGKILL"}, starts: 1,
	},
}

// Issue item 6, end to end: whether a container that ends by itself is started
// again, how often and after what waits, is as its crash policy says; how it ended
// is told. A daemon that is killed meanwhile changes nothing. A restart, or a
// change, begins anew.
func TestCrashPolicy(t *testing.T) {
	s := newFleet(t, 3*time.Minute, lab.Options{OwnContainerd: true})
	for _, c := range policyCases {
		s.addEnding(c)
	}
	for _, c := range policyCases {
		if c.signal != 0 {
			w := s.until(s.id(c.name), "running", func(w *workspacev1.Workspace) bool { return w.State == running })
			s.inside(s.id(c.name), w.ObservedGeneration)
			s.kill(w, c.signal)
		}
	}
	for _, c := range policyCases {
		s.checkEnded(c)
	}

	// Nobody starts them after the daemon's death.
	if err := s.Daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	s.start()
	s.wait(s.sentry(), 0)
	for _, c := range policyCases {
		c.starts = 0
		s.checkEnded(c)
	}

	// A restart is a new generation, which is tried as often.
	retries := policyCases[0]
	if _, err := s.client().RestartWorkspace(s.ctx, &workspacev1.RestartWorkspaceRequest{Name: "workspaces/" + s.id(retries.name)}); err != nil {
		t.Fatal(err)
	}
	s.asked[retries.name].again = true // three times
	s.until(s.id(retries.name), "tried again", func(w *workspacev1.Workspace) bool { return w.ObservedGeneration == 2 })
	s.checkEnded(retries)
	// So is one without what makes it end, which stays.
	s.wait(s.id(retries.name), s.update(s.id(retries.name), s.fleetSpec(retries.name), "spec.env"))
	w := s.until(s.id(retries.name), "healed", func(w *workspacev1.Workspace) bool { return w.State == running })
	if w.LastError != nil {
		t.Errorf("healed: %v", w)
	}
	s.asked[retries.name].ended = 0
	s.verify()
}

// addEnding makes a workspace that ends by itself.
func (s *fleet) addEnding(c policyCase) {
	s.t.Helper()
	spec := s.fleetSpec(c.name)
	for key, value := range c.env {
		spec.Env[key] = value
	}
	spec.CrashPolicy = c.policy
	spec.Resources = &workspacev1.Resources{MemoryBytes: c.memory}
	if _, err := s.client().CreateWorkspace(s.ctx, &workspacev1.CreateWorkspaceRequest{
		WorkspaceId: s.id(c.name), Workspace: &workspacev1.Workspace{Spec: spec},
	}); err != nil {
		s.t.Fatal(err)
	}
	s.asked[c.name] = &asked{exists: true, ended: c.state, secrets: map[string]string{}}
}

// sentry makes a workspace, and returns its id: by the time that it runs the
// actors of those before it have looked at theirs, or will not.
func (s *fleet) sentry() string {
	s.t.Helper()
	s.add("sentry", map[string]string{})
	return s.id("sentry")
}

// checkEnded waits until a workspace is not started any more, and checks how it
// came to that. starts counts those since the last look.
func (s *fleet) checkEnded(c policyCase) {
	s.t.Helper()
	w := s.until(s.id(c.name), c.state.String(), func(w *workspacev1.Workspace) bool { return w.State == c.state })
	e := w.LastExit
	if e.GetCode() != c.exit.Code || e.GetCodeKnown() != c.exit.CodeKnown || e.GetSignal() != c.exit.Signal || e.GetOomKilled() != c.exit.OomKilled || e.GetExitTime() == nil {
		s.t.Errorf("%s: last exit %v, want %v", c.name, e, c.exit)
	}
	if w.ContainerId != "" || w.Pid != 0 {
		s.t.Errorf("%s: a container is on record: %v", c.name, w)
	}
	var times []time.Time
	for _, entry := range s.journal(c.name) {
		if !entry.Ends {
			times = append(times, entry.Time)
		}
	}
	if len(times) != c.starts {
		s.t.Errorf("%s: started %d times, want %d", c.name, len(times), c.starts)
	}
	if n := len(times); n > 1 && times[n-1].Sub(times[0]) < c.between {
		s.t.Errorf("%s: %d starts within %v, want at least %v", c.name, n, times[n-1].Sub(times[0]), c.between)
	}

	ctx, cancel := context.WithTimeout(s.ctx, 10*time.Second)
	defer cancel()
	_, err := s.client().WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{Name: "workspaces/" + s.id(c.name)})
	if c.state != exhausted {
		if err != nil { // it was started, and did what it was to do
			s.t.Errorf("%s: a wait is told %v", c.name, err)
		}
		return
	}
	if status.Code(err) != codes.FailedPrecondition || reasonOf(err) != "RETRIES_EXHAUSTED" {
		s.t.Errorf("%s: a wait is told %v, want RETRIES_EXHAUSTED", c.name, err)
	}
}

// reasonOf is the machine-readable reason of an error of the API.
func reasonOf(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info.Reason
		}
	}
	return fmt.Sprintf("none in %v", err)
}
