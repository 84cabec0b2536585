package server_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/server/servertest"
)

const image = "registry.example/app:1"

// anything is a policy that refuses nothing.
var anything = runtime.Policy{AllowPrivileged: true, HostPaths: []string{"/"}}

// harness is a server in a bubble.
type harness struct {
	*servertest.Server
	t   *testing.T
	log *buffer
}

// run runs a test against a server of its own, in a bubble: time is the test's.
func run(t *testing.T, test func(t *testing.T, h *harness), options ...servertest.Option) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		h := &harness{t: t, log: &buffer{}}
		logger := slog.New(slog.NewTextHandler(io.MultiWriter(h.log, t.Output()), &slog.HandlerOptions{Level: slog.LevelDebug}))
		h.Server = servertest.New(t, append([]servertest.Option{servertest.WithLogger(logger), servertest.WithPolicy(anything)}, options...)...)
		test(t, h)
	})
}

// buffer is a bytes.Buffer for many goroutines.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// must fails the test on an error.
func must[T any](t *testing.T, v T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func spec() *workspacev1.WorkspaceSpec { return &workspacev1.WorkspaceSpec{Image: image} }

// create makes a workspace and waits until it runs and nothing happens any more.
func (h *harness) create(id string, edits ...func(*workspacev1.CreateWorkspaceRequest)) *workspacev1.Workspace {
	h.t.Helper()
	req := &workspacev1.CreateWorkspaceRequest{WorkspaceId: id, Workspace: &workspacev1.Workspace{Spec: spec()}}
	for _, edit := range edits {
		edit(req)
	}
	resp := must2(h.Client.CreateWorkspace(h.t.Context(), req))(h.t)
	synctest.Wait()
	return h.get(resp.GetWorkspace().GetName())
}

// must2 is must for calls: must2(f())(t).
func must2[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		return must(t, v, err)
	}
}

func (h *harness) get(name string) *workspacev1.Workspace {
	h.t.Helper()
	return must2(h.Client.GetWorkspace(h.t.Context(), &workspacev1.GetWorkspaceRequest{Name: name}))(h.t).GetWorkspace()
}

func (h *harness) set(name, value string) *workspacev1.SetSecretResponse {
	h.t.Helper()
	return must2(h.Client.SetSecret(h.t.Context(), &workspacev1.SetSecretRequest{
		Name: name, Payload: &workspacev1.SetSecretRequest_Text{Text: value},
	}))(h.t)
}

// env is the environment that the workspace's container runs with.
func (h *harness) env(id string) []string {
	h.t.Helper()
	in, ok := h.Runtime.Running(id)
	if !ok {
		h.t.Fatalf("%s does not run", id)
	}
	return h.Runtime.Env(in.ID)
}

func (h *harness) wantEnv(id string, entries ...string) {
	h.t.Helper()
	env := h.env(id)
	for _, e := range entries {
		if !slices.Contains(env, e) {
			h.t.Errorf("%s runs without %s: %q", id, e, env)
		}
	}
}

// state is everything that callers can see, once nothing happens any more.
func (h *harness) state() []proto.Message {
	h.t.Helper()
	synctest.Wait()
	var all []proto.Message
	parents := []string{"global"}
	list := must2(h.Client.ListWorkspaces(h.t.Context(), &workspacev1.ListWorkspacesRequest{PageSize: 1000}))(h.t)
	for _, w := range list.GetWorkspaces() {
		all = append(all, w)
		parents = append(parents, w.GetName())
	}
	for _, p := range parents {
		secrets := must2(h.Client.ListSecrets(h.t.Context(), &workspacev1.ListSecretsRequest{Parent: p, PageSize: 1000}))(h.t)
		for _, s := range secrets.GetSecrets() {
			all = append(all, s)
		}
	}
	return all
}

// wantUnchanged checks that a call changes nothing.
func (h *harness) wantUnchanged(call func()) {
	h.t.Helper()
	before := h.state()
	calls := len(h.Runtime.Calls())
	call()
	if diff := cmp.Diff(before, h.state(), protocmp.Transform()); diff != "" {
		h.t.Errorf("something changed:\n%s", diff)
	}
	if n := len(h.Runtime.Calls()); n != calls {
		h.t.Errorf("the runtime got %d calls", n-calls)
	}
}

// wantCode checks an error's code and, unless it is empty, its ErrorInfo's
// reason.
func wantCode(t *testing.T, err error, code codes.Code, reason string) {
	t.Helper()
	if got := status.Code(err); got != code {
		t.Fatalf("got %v (%v), want %v", got, err, code)
	}
	info := detail[*errdetails.ErrorInfo](err)
	if reason != "" && (info.GetReason() != reason || info.GetDomain() != "workspaced") {
		t.Errorf("got ErrorInfo %v, want reason %s", info, reason)
	}
}

// detail returns the error's first detail of a type, nil when it has none.
func detail[T proto.Message](err error) (none T) {
	for _, d := range status.Convert(err).Details() {
		if d, ok := d.(T); ok {
			return d
		}
	}
	return none
}

// fields are those that an INVALID_ARGUMENT names, with what would be right.
func fields(err error) map[string]string {
	m := make(map[string]string)
	for _, v := range detail[*errdetails.BadRequest](err).GetFieldViolations() {
		m[v.GetField()] = v.GetDescription()
	}
	return m
}

// ctx is the test's.
func (h *harness) ctx() context.Context { return h.t.Context() }

// advance lets time pass in a bubble, at once.
func advance(d time.Duration) { <-time.After(d) }

// recvUntil reads a watch up to an event that stop accepts, that one included.
func recvUntil(t *testing.T, stream workspacev1.WorkspaceControl_WatchWorkspacesClient, stop func(*workspacev1.WatchWorkspacesResponse) bool) []*workspacev1.WatchWorkspacesResponse {
	t.Helper()
	var all []*workspacev1.WatchWorkspacesResponse
	for {
		r, err := stream.Recv()
		if err != nil {
			t.Fatalf("after %v: %v", show(all), err)
		}
		all = append(all, r)
		if stop(r) {
			return all
		}
	}
}

func isSynced(r *workspacev1.WatchWorkspacesResponse) bool { return r.GetSynced() != nil }

// show makes events readable: "+a gen 1", "-a", "synced", "resync".
func show(rs []*workspacev1.WatchWorkspacesResponse) []string {
	var out []string
	for _, r := range rs {
		switch e := r.GetEvent().(type) {
		case *workspacev1.WatchWorkspacesResponse_Workspace:
			out = append(out, "+"+strings.TrimPrefix(e.Workspace.GetName(), "workspaces/"))
		case *workspacev1.WatchWorkspacesResponse_Removed:
			out = append(out, "-"+strings.TrimPrefix(e.Removed.GetName(), "workspaces/"))
		case *workspacev1.WatchWorkspacesResponse_Synced:
			out = append(out, "synced")
		case *workspacev1.WatchWorkspacesResponse_Resync:
			out = append(out, "resync")
		}
	}
	return out
}

var errTest = errors.New("inner text that no caller may see")

func codeOf(err error) codes.Code { return status.Code(err) }

func reasonOf(err error) string { return detail[*errdetails.ErrorInfo](err).GetReason() }
