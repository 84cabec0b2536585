package server_test

import (
	"context"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/store"
)

// TestCallsAreLogged: one line a call when it has ended, at the level of its
// outcome.
func TestCallsAreLogged(t *testing.T) {
	id := regexp.MustCompile(`call_id=[0-9a-f-]{36} `)
	for _, tt := range []struct {
		name string
		call func(context.Context, workspacev1.WorkspaceControlClient, healthv1.HealthClient)
		want string
	}{
		{
			"a call that reads",
			func(ctx context.Context, c workspacev1.WorkspaceControlClient, _ healthv1.HealthClient) {
				_, _ = c.GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: "workspaces/w"})
			},
			`level=DEBUG msg="finished call" protocol=grpc grpc.component=server grpc.service=workspace.v1.WorkspaceControl grpc.method=GetWorkspace grpc.method_type=unary call_id=ID peer.address=bufconn subject=test grpc.start_time=2000-01-01T00:00:00Z grpc.request.deadline=2000-01-01T00:00:10Z grpc.code=OK grpc.time_ms=1500`,
		},
		{
			"a change that is refused",
			func(ctx context.Context, c workspacev1.WorkspaceControlClient, _ healthv1.HealthClient) {
				_, _ = c.StopWorkspace(ctx, &workspacev1.StopWorkspaceRequest{Name: "workspaces/w", RequestId: "no ASCII \u00e9"})
			},
			`level=INFO msg="finished call" protocol=grpc grpc.component=server grpc.service=workspace.v1.WorkspaceControl grpc.method=StopWorkspace grpc.method_type=unary call_id=ID peer.address=bufconn subject=test grpc.start_time=2000-01-01T00:00:00Z grpc.request.deadline=2000-01-01T00:00:10Z grpc.code=InvalidArgument grpc.error="invalid request_id: must be at most 128 printable ASCII characters without spaces" grpc.time_ms=0`,
		},
		{
			"a change",
			func(ctx context.Context, c workspacev1.WorkspaceControlClient, _ healthv1.HealthClient) {
				_, _ = c.StopWorkspace(ctx, &workspacev1.StopWorkspaceRequest{Name: "workspaces/w"})
			},
			`level=INFO msg="finished call" protocol=grpc grpc.component=server grpc.service=workspace.v1.WorkspaceControl grpc.method=StopWorkspace grpc.method_type=unary call_id=ID peer.address=bufconn subject=test grpc.start_time=2000-01-01T00:00:00Z grpc.request.deadline=2000-01-01T00:00:10Z grpc.code=OK grpc.time_ms=0`,
		},
		{
			"a watch",
			func(ctx context.Context, c workspacev1.WorkspaceControlClient, _ healthv1.HealthClient) {
				stream, err := c.WatchWorkspaces(ctx, &workspacev1.WatchWorkspacesRequest{ResumeToken: "none"})
				if err == nil {
					_, _ = stream.Recv()
				}
			},
			`level=INFO msg="finished call" protocol=grpc grpc.component=server grpc.service=workspace.v1.WorkspaceControl grpc.method=WatchWorkspaces grpc.method_type=server_stream call_id=ID peer.address=bufconn subject=test grpc.start_time=2000-01-01T00:00:00Z grpc.request.deadline=2000-01-01T00:00:10Z grpc.code=InvalidArgument grpc.error="invalid resume_token: must be the resume_token of a response of WatchWorkspaces, or empty" grpc.time_ms=0`,
		},
		{
			"another service",
			func(ctx context.Context, _ workspacev1.WorkspaceControlClient, h healthv1.HealthClient) {
				_, _ = h.Check(ctx, &healthv1.HealthCheckRequest{})
			},
			`level=DEBUG msg="finished call" protocol=grpc grpc.component=server grpc.service=grpc.health.v1.Health grpc.method=Check grpc.method_type=unary call_id=ID peer.address=bufconn subject=test grpc.start_time=2000-01-01T00:00:00Z grpc.request.deadline=2000-01-01T00:00:10Z grpc.code=OK grpc.time_ms=0`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				st := &stoppable{faultyStore{workspace: func(string) (store.Workspace, error) {
					<-time.After(1500 * time.Millisecond) // the bubble's clock
					return store.Workspace{ID: "w"}, nil
				}}}
				_, conn, log := serve(t, server.Config{Store: st, Hub: make(hints)})
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				tt.call(ctx, workspacev1.NewWorkspaceControlClient(conn), healthv1.NewHealthClient(conn))
				synctest.Wait()
				_, line, _ := strings.Cut(log.String(), " ")
				if diff := cmp.Diff(tt.want+"\n", id.ReplaceAllString(line, "call_id=ID ")); diff != "" {
					t.Error(diff)
				}
			})
		})
	}
}

// stoppable is a store whose workspaces can be stopped.
type stoppable struct{ faultyStore }

func (*stoppable) StopWorkspace(context.Context, string, store.Options) (store.Result, error) {
	return store.Result{}, nil
}
