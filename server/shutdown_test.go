package server_test

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

// shutdown is a server in a bubble, whose end is up to the test.
type shutdown struct {
	t      *testing.T
	server *server.Server
	grpc   *grpc.Server
	conn   *grpc.ClientConn
	client workspacev1.WorkspaceControlClient
	served chan error
}

func newShutdown(t *testing.T, st *faultyStore) *shutdown {
	t.Helper()
	s := &shutdown{
		t:      t,
		server: server.New(server.Config{Store: st, Hub: make(hints), Logger: slog.New(slog.DiscardHandler)}),
		served: make(chan error, 1),
	}
	s.grpc = s.server.NewGRPC(grpc.WaitForHandlers(true), grpc.Creds(access.Fixed(access.Everything("test"))))
	listener := bufconn.Listen(1 << 16)
	go func() { s.served <- s.grpc.Serve(listener) }()
	s.conn = must2(grpc.NewClient("passthrough:///x",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials())))(t)
	// Not before the test has read what its streams still have.
	t.Cleanup(func() { _ = s.conn.Close() })
	s.client = workspacev1.NewWorkspaceControlClient(s.conn)
	return s
}

// want shuts down, with half a minute for calls in flight, and checks what that
// takes and comes to.
func (s *shutdown) want(atLeast, atMost time.Duration, finished bool) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	start := time.Now()
	if got := s.server.Shutdown(ctx, s.grpc); got != finished {
		s.t.Errorf("every call was finished: %v, want %v", got, finished)
	}
	if d := time.Since(start); d < atLeast || d > atMost {
		s.t.Errorf("it took %v, want %v to %v", d, atLeast, atMost)
	}
	if err := <-s.served; err != nil {
		s.t.Error(err)
	}
}

// slowWatch opens a watch and does not read it, until the server can't send more.
func (s *shutdown) slowWatch() workspacev1.WorkspaceControl_WatchWorkspacesClient {
	s.t.Helper()
	stream := must2(s.client.WatchWorkspaces(s.t.Context(), &workspacev1.WatchWorkspacesRequest{}))(s.t)
	synctest.Wait()
	return stream
}

// oneWorkspace is never on the way to another generation.
func oneWorkspace(string) (store.Workspace, error) {
	return store.Workspace{ID: "w", Generation: 1}, nil
}

// endlessFeed has more to send than any window takes.
func endlessFeed(_, after uint64) (store.FeedPage, error) {
	w := &store.Workspace{ID: "w", Labels: map[string]string{"long": strings.Repeat("x", 1000)}}
	return store.FeedPage{Entries: []store.FeedEntry{{Revision: after + 1, Workspace: w}}, More: true, Next: after + 1}, nil
}

// After Drain no watch, wait or health watch keeps the server.
func TestShutdownIsNotHeldUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShutdown(t, &faultyStore{
			workspace: oneWorkspace,
			feed:      func(_, _ uint64) (store.FeedPage, error) { return store.FeedPage{Next: 7}, nil },
		})
		health := watchHealth(t, s.conn)
		stream := must2(s.client.WatchWorkspaces(t.Context(), &workspacev1.WatchWorkspacesRequest{}))(t)
		recvUntil(t, stream, isSynced)
		waited := make(chan error, 1)
		go func() {
			_, err := s.client.WaitWorkspace(t.Context(), &workspacev1.WaitWorkspaceRequest{Name: "workspaces/w"})
			waited <- err
		}()
		synctest.Wait()

		s.want(0, 0, true)
		wantCode(t, <-waited, codes.Unavailable, "DRAINING")
		_, err := stream.Recv()
		wantCode(t, err, codes.Unavailable, "DRAINING")
		health("NOT_SERVING")
	})
}

// TestContract14_ShutdownIsNotHeldUpByWhoDoesNotRead: a client that does not read
// its watch gets no half minute for it.
func TestContract14_ShutdownIsNotHeldUpByWhoDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShutdown(t, &faultyStore{feed: endlessFeed})
		stream := s.slowWatch()
		s.want(0, time.Second, true)
		for {
			if _, err := stream.Recv(); err != nil {
				wantCode(t, err, codes.Unavailable, "")
				return
			}
		}
	})
}

// Calls in flight may finish, whoever does not read beside them.
func TestShutdownLetsCallsFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShutdown(t, &faultyStore{feed: endlessFeed, workspace: func(id string) (store.Workspace, error) {
			<-time.After(20 * time.Second) // a slow disk
			return oneWorkspace(id)
		}})
		s.slowWatch()
		got := make(chan error, 2)
		for range 2 {
			go func() {
				_, err := s.client.GetWorkspace(t.Context(), &workspacev1.GetWorkspaceRequest{Name: "workspaces/w"})
				got <- err
			}()
			<-time.After(5 * time.Second)
		}
		s.want(15*time.Second, 16*time.Second, true)
		for range 2 {
			if err := <-got; err != nil {
				t.Error(err)
			}
		}
	})
}

// Calls that don't come to an end are broken off when time is up.
func TestShutdownEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShutdown(t, &faultyStore{workspace: func(id string) (store.Workspace, error) {
			<-time.After(40 * time.Second)
			return oneWorkspace(id)
		}})
		got := make(chan error, 1)
		go func() {
			_, err := s.client.GetWorkspace(t.Context(), &workspacev1.GetWorkspaceRequest{Name: "workspaces/w"})
			got <- err
		}()
		synctest.Wait()
		s.want(30*time.Second, 40*time.Second, false)
		wantCode(t, <-got, codes.Unavailable, "")
	})
}
