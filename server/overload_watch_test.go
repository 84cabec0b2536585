package server_test

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

// records is a server over a store and a hub, without actors: nothing but calls
// changes anything.
type records struct {
	tb   testing.TB
	st   *store.Store
	dial func(context.Context, string) (net.Conn, error)
	// WorkspaceControlClient is one that reads what it gets.
	workspacev1.WorkspaceControlClient
}

// newRecords serves until the test ends, on the listener that dial connects to.
func newRecords(tb testing.TB, listener net.Listener, dial func(context.Context) (net.Conn, error)) *records {
	tb.Helper()
	dir := tb.TempDir()
	kek, err := seal.LoadOrCreate(filepath.Join(dir, "key"))
	if err != nil {
		tb.Fatal(err)
	}
	hub := workspace.NewHub()
	st, err := store.Open(store.Config{Path: filepath.Join(dir, "db"), KEK: kek, OnCommit: hub.OnCommit})
	if err != nil {
		tb.Fatal(err)
	}
	s := server.New(server.Config{Store: st, Hub: hub, Logger: slog.New(slog.DiscardHandler)})
	g := s.NewGRPC(grpc.WaitForHandlers(true), grpc.Creds(access.Fixed(access.Everything("test"))))
	ctx, cancel := context.WithCancel(context.Background())
	served, hubbed := make(chan error, 1), make(chan error, 1)
	go func() { served <- g.Serve(listener) }()
	go func() { hubbed <- hub.Run(ctx, func() {}) }()
	tb.Cleanup(func() {
		g.Stop()
		cancel()
		for _, err := range []error{<-served, <-hubbed, st.Close()} {
			if err != nil {
				tb.Error(err)
			}
		}
	})
	r := &records{tb: tb, st: st, dial: func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx) }}
	r.WorkspaceControlClient = r.connect()
	return r
}

// connect makes a client with a connection of its own.
func (r *records) connect(options ...grpc.DialOption) workspacev1.WorkspaceControlClient {
	r.tb.Helper()
	conn, err := grpc.NewClient("passthrough:///x", append(options,
		grpc.WithContextDialer(r.dial), grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		r.tb.Fatal(err)
	}
	r.tb.Cleanup(func() { _ = conn.Close() })
	return workspacev1.NewWorkspaceControlClient(conn)
}

// slow makes a client that lets the server send no more than 64 KiB beyond what
// it has read. By default a client's window grows with what the connection can
// carry, whether it reads or not; that is its own memory.
func (r *records) slow() workspacev1.WorkspaceControlClient {
	r.tb.Helper()
	return r.connect(grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(16<<20))
}

// create makes a workspace with a record of a size that is usual.
func (r *records) create(id string) {
	r.tb.Helper()
	if _, err := r.CreateWorkspace(r.tb.Context(), &createReq{WorkspaceId: id, Workspace: &ws{
		Labels: map[string]string{"team": "a", "app.kubernetes.io/name": id},
		Spec:   &workspacev1.WorkspaceSpec{Image: image, Env: map[string]string{"TEXT": strings.Repeat("z", 1000)}},
	}}); err != nil {
		r.tb.Fatal(err)
	}
}

func (r *records) set(id, value string) {
	r.tb.Helper()
	if _, err := r.SetSecret(r.tb.Context(), &workspacev1.SetSecretRequest{
		Name: "workspaces/" + id + "/secrets/K", Payload: &workspacev1.SetSecretRequest_Text{Text: value},
	}); err != nil {
		r.tb.Fatal(err)
	}
}

// TestOverload_SlowWatchers: watchers that don't read hold up neither writers nor
// watchers that do, and cost what gRPC keeps for a stream, however much there is
// to tell.
func TestOverload_SlowWatchers(t *testing.T) {
	const workspaces, watchers, perWatcher = 200, 100, 400 << 10
	synctest.Test(t, func(t *testing.T) {
		listener := bufconn.Listen(1 << 20)
		r := newRecords(t, listener, listener.DialContext)
		ids := names("w", workspaces) // more than a stream's windows hold
		for _, id := range ids {
			r.create(id)
		}
		slow := r.slow()
		heap, goroutines := heapInUse(), goruntime.NumGoroutine()

		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		streams := make([]workspacev1.WorkspaceControl_WatchWorkspacesClient, watchers)
		for i := range streams {
			streams[i] = must2(slow.WatchWorkspaces(ctx, &workspacev1.WatchWorkspacesRequest{}))(t)
		}
		begun := heapInUse() - heap
		fast := must2(r.WatchWorkspaces(ctx, &workspacev1.WatchWorkspacesRequest{}))(t)
		recvUntil(t, fast, isSynced)
		for _, id := range ids {
			r.set(id, "changed")
			recvUntil(t, fast, func(e *workspacev1.WatchWorkspacesResponse) bool {
				return e.GetWorkspace().GetName() == "workspaces/"+id && e.GetWorkspace().GetGeneration() == 2
			})
		}
		later := heapInUse() - heap
		t.Logf("%d KB a watcher, %d KB after %d changes", begun/watchers>>10, later/watchers>>10, workspaces)
		if begun > watchers*perWatcher || later > watchers*perWatcher {
			t.Errorf("want at most %d KB a watcher", perWatcher>>10)
		}

		// One that reads at last learns of the newest state of each.
		newest := make(map[string]int64)
		for len(newest) < workspaces || newest["workspaces/"+ids[workspaces-1]] < 2 {
			w := must2(streams[7].Recv())(t).GetWorkspace()
			if w != nil {
				newest[w.GetName()] = w.GetGeneration()
			}
		}
		cancel()
		synctest.Wait()
		if got := goruntime.NumGoroutine(); got > goroutines+fewGoroutines {
			t.Errorf("%d goroutines are left, %d before", got, goroutines)
		}
		goruntime.KeepAlive(streams)
	})
}
