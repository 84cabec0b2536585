package server_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

// faultyStore does what its funcs say; the rest panics with a nil interface.
type faultyStore struct {
	server.Store
	workspace func(id string) (store.Workspace, error)
	feed      func(since, after uint64) (store.FeedPage, error)
	list      func(after string, limit int, match func(*store.Workspace) bool) ([]store.Workspace, bool, error)
}

func (f *faultyStore) Workspace(id string) (store.Workspace, error) { return f.workspace(id) }
func (f *faultyStore) SharedWorkspace(id string) (*store.Shared, error) {
	w, err := f.workspace(id)
	return &store.Shared{Workspace: w}, err
}
func (f *faultyStore) ListShared(after string, limit int, match func(*store.Workspace) bool) (shared []*store.Shared, more bool, err error) {
	ws, more, err := f.list(after, limit, match)
	for _, w := range ws {
		shared = append(shared, &store.Shared{Workspace: w})
	}
	return shared, more, err
}
func (f *faultyStore) AuditLater(store.AuditEntry) {}
func (f *faultyStore) InstanceUID() string         { return "instance" }
func (f *faultyStore) Revision() uint64            { return 7 }
func (f *faultyStore) ListWorkspaces(after string, limit int, match func(*store.Workspace) bool) ([]store.Workspace, bool, error) {
	return f.list(after, limit, match)
}
func (f *faultyStore) FeedSince(since, after uint64, _ int) (store.FeedPage, error) {
	return f.feed(since, after)
}

// hints is a hub whose hints a test gives.
type hints chan struct{}

func (h hints) Watch(string) (<-chan struct{}, func()) { return h, func() {} }

// serve runs a server over a store, and returns a client and its log.
func serve(t *testing.T, cfg server.Config) (*server.Server, *grpc.ClientConn, *buffer) {
	t.Helper()
	log := &buffer{}
	cfg.Logger = slog.New(slog.NewTextHandler(io.MultiWriter(log, t.Output()), &slog.HandlerOptions{Level: slog.LevelDebug}))
	s := server.New(cfg)
	return s, listen(t, s, access.Everything("test")), log
}

// listen serves s until the test ends, to the subject.
func listen(t testing.TB, s *server.Server, as access.Subject) *grpc.ClientConn {
	t.Helper()
	g := s.NewGRPC(grpc.WaitForHandlers(true), grpc.Creds(access.Fixed(as)))
	listener := bufconn.Listen(1 << 16)
	done := make(chan error, 1)
	go func() { done <- g.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:///x",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		g.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return conn
}

func serveStore(t *testing.T, f *faultyStore) (workspacev1.WorkspaceControlClient, *buffer) {
	t.Helper()
	_, conn, log := serve(t, server.Config{Store: f, Hub: make(hints)})
	return workspacev1.NewWorkspaceControlClient(conn), log
}

// TestContract22_EveryErrorHasACode: each error of the store becomes one status,
// none UNKNOWN, and none with inner text.
func TestContract22_EveryErrorHasACode(t *testing.T) {
	wrap := func(err error) error { return fmt.Errorf("%w: %w", err, errTest) }
	for _, tt := range []struct {
		name    string
		err     error
		code    codes.Code
		reason  string
		details []proto.Message // of these types
	}{
		{"not found", &store.NotFoundError{WorkspaceID: "w"}, codes.NotFound, "WORKSPACE_NOT_FOUND", []proto.Message{&errdetails.ResourceInfo{}}},
		{"secret not found", &store.NotFoundError{WorkspaceID: "w", Key: "K"}, codes.NotFound, "SECRET_NOT_FOUND", []proto.Message{&errdetails.ResourceInfo{}}},
		{"exists", wrap(store.ErrExists), codes.AlreadyExists, "WORKSPACE_EXISTS", []proto.Message{&errdetails.ResourceInfo{}}},
		{"etag", wrap(store.ErrEtag), codes.Aborted, "ETAG_MISMATCH", nil},
		{"deleting", wrap(store.ErrDeleting), codes.FailedPrecondition, "WORKSPACE_DELETING", []proto.Message{&errdetails.PreconditionFailure{}}},
		{"parked", wrap(store.ErrParked), codes.FailedPrecondition, "WORKSPACE_STOPPED", []proto.Message{&errdetails.PreconditionFailure{}}},
		{"request id", wrap(store.ErrRequestReused), codes.InvalidArgument, "REQUEST_ID_REUSED", []proto.Message{&errdetails.BadRequest{}}},
		{"quota", &store.QuotaError{Limit: 1, Size: 2}, codes.ResourceExhausted, "SECRETS_TOO_LARGE", []proto.Message{&errdetails.QuotaFailure{}}},
		{"quota of all", &store.TotalError{What: "workspaces", Limit: 1}, codes.ResourceExhausted, "QUOTA_EXCEEDED", []proto.Message{&errdetails.QuotaFailure{}}},
		{"model key", &store.KeyError{Key: "K", Err: store.ErrModelKey}, codes.FailedPrecondition, "KEY_CARRIES_MODEL", []proto.Message{&errdetails.PreconditionFailure{}}},
		{"disk full", wrap(store.ErrDiskFull), codes.ResourceExhausted, "DISK_FULL", []proto.Message{&errdetails.RetryInfo{}}},
		{"read-only", wrap(store.ErrReadOnly), codes.Unavailable, "STORAGE_UNAVAILABLE", []proto.Message{&errdetails.RetryInfo{}}},
		{"damaged", wrap(store.ErrDamaged), codes.Unavailable, "STORAGE_UNAVAILABLE", []proto.Message{&errdetails.RetryInfo{}}},
		{"in doubt", wrap(store.ErrInDoubt), codes.Unavailable, "CHANGE_IN_DOUBT", []proto.Message{&errdetails.RetryInfo{}}},
		{"in doubt, deadline", fmt.Errorf("%w: %w", store.ErrInDoubt, context.DeadlineExceeded), codes.DeadlineExceeded, "CHANGE_IN_DOUBT", nil},
		{"in doubt, cancelled", fmt.Errorf("%w: %w", store.ErrInDoubt, context.Canceled), codes.Canceled, "CHANGE_IN_DOUBT", nil},
		{"closed", wrap(store.ErrClosed), codes.Unavailable, "DRAINING", []proto.Message{&errdetails.RetryInfo{}}},
		{"cancelled", wrap(context.Canceled), codes.Canceled, "", nil},
		{"deadline", wrap(context.DeadlineExceeded), codes.DeadlineExceeded, "", nil},
		{"unreadable", &store.KeyError{Key: "K", Err: wrap(store.ErrUnreadable)}, codes.Internal, "INTERNAL", []proto.Message{&errdetails.RequestInfo{}}},
		{"compacted", wrap(store.ErrCompacted), codes.Internal, "INTERNAL", []proto.Message{&errdetails.RequestInfo{}}},
		{"anything", errTest, codes.Internal, "INTERNAL", []proto.Message{&errdetails.RequestInfo{}}},
		{"unknown status", status.Error(codes.Unknown, errTest.Error()), codes.Internal, "INTERNAL", []proto.Message{&errdetails.RequestInfo{}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, log := serveStore(t, &faultyStore{workspace: func(string) (store.Workspace, error) { return store.Workspace{}, tt.err }})
				_, err := client.GetWorkspace(t.Context(), &workspacev1.GetWorkspaceRequest{Name: "workspaces/w"})
				wantCode(t, err, tt.code, tt.reason)
				all := fmt.Sprint(status.Convert(err).Proto())
				if strings.Contains(all, errTest.Error()) {
					t.Errorf("inner text: %s", all)
				}
				for _, want := range tt.details {
					if !strings.Contains(all, string(want.ProtoReflect().Descriptor().FullName())) {
						t.Errorf("no %T in %s", want, all)
					}
				}
				if tt.code == codes.Internal {
					id := detail[*errdetails.RequestInfo](err).GetRequestId()
					if len(id) != 36 || !strings.Contains(log.String(), "call_id="+id) {
						t.Errorf("id %q is not in the log", id)
					}
				}
			})
		})
	}
}

// TestPanicIsInternal: the caller sees nothing of it, the log all.
func TestPanicIsInternal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, log := serveStore(t, &faultyStore{
			workspace: func(string) (store.Workspace, error) { panic(errTest) },
			feed:      func(uint64, uint64) (store.FeedPage, error) { panic(errTest) },
		})
		_, err := client.GetWorkspace(t.Context(), &workspacev1.GetWorkspaceRequest{Name: "workspaces/w"})
		stream := must2(client.WatchWorkspaces(t.Context(), &workspacev1.WatchWorkspacesRequest{}))(t)
		_, streamErr := stream.Recv()
		for _, err := range []error{err, streamErr} {
			wantCode(t, err, codes.Internal, "INTERNAL")
			if all := fmt.Sprint(status.Convert(err).Proto()); strings.Contains(all, errTest.Error()) || strings.Contains(all, "_test.go") {
				t.Errorf("inner text: %s", all)
			}
			id := detail[*errdetails.RequestInfo](err).GetRequestId()
			var line string
			for l := range strings.Lines(log.String()) {
				if strings.Contains(l, id) && strings.Contains(l, "stack=") {
					line = l
				}
			}
			if !strings.Contains(line, errTest.Error()) || !strings.Contains(line, "faults_test.go") {
				t.Errorf("the log does not tell where: %q", line)
			}
		}
	})
}

// TestContract15_WaitEndsWhenTheWorkspaceIsDeleted: also when another one has
// its name by then.
func TestContract15_WaitEndsWhenTheWorkspaceIsDeleted(t *testing.T) {
	for name, next := range map[string]func() (store.Workspace, error){
		"gone":       func() (store.Workspace, error) { return store.Workspace{}, &store.NotFoundError{WorkspaceID: "w"} },
		"made again": func() (store.Workspace, error) { return store.Workspace{ID: "w", UID: "2", Generation: 9}, nil },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				read := func() (store.Workspace, error) { return store.Workspace{ID: "w", UID: "1", Generation: 3}, nil }
				hub := make(hints, 1)
				_, conn, _ := serve(t, server.Config{Hub: hub, Store: &faultyStore{workspace: func(string) (store.Workspace, error) {
					defer func() { read = next }()
					return read()
				}}})
				done := make(chan error, 1)
				go func() {
					_, err := workspacev1.NewWorkspaceControlClient(conn).WaitWorkspace(t.Context(), &workspacev1.WaitWorkspaceRequest{Name: "workspaces/w"})
					done <- err
				}()
				synctest.Wait()
				hub <- struct{}{}
				err := <-done
				wantCode(t, err, codes.NotFound, "WORKSPACE_DELETED")
				if n := detail[*errdetails.ResourceInfo](err).GetResourceName(); n != "workspaces/w" {
					t.Errorf("resource %q", n)
				}
			})
		})
	}
}

// TestWatchThatIsCompactedOnItsWay: a watch that fell behind is told so, and
// gets everything.
func TestWatchThatIsCompactedOnItsWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		client, _ := serveStore(t, &faultyStore{feed: func(since, after uint64) (store.FeedPage, error) {
			calls++
			switch calls {
			case 1:
				return store.FeedPage{Entries: []store.FeedEntry{{Revision: 1, Workspace: &store.Workspace{ID: "a"}}}, More: true, Next: 1}, nil
			case 2:
				return store.FeedPage{}, store.ErrCompacted
			}
			if since != 7 || after != 0 {
				t.Errorf("it goes on from %d, %d", since, after)
			}
			return store.FeedPage{Entries: []store.FeedEntry{{Revision: 7, Workspace: &store.Workspace{ID: "b"}}}, Next: 7}, nil
		}})
		stream := must2(client.WatchWorkspaces(t.Context(), &workspacev1.WatchWorkspacesRequest{}))(t)
		got := fmt.Sprint(show(recvUntil(t, stream, isSynced)))
		if got != "[+a resync +b synced]" {
			t.Errorf("got %s", got)
		}
	})
}

// TestWatchesShareWhatTheyRead: watches at the same place read it once.
func TestWatchesShareWhatTheyRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var reads atomic.Int64
		client, _ := serveStore(t, &faultyStore{feed: func(_, _ uint64) (store.FeedPage, error) {
			reads.Add(1)
			return store.FeedPage{Entries: []store.FeedEntry{{Revision: 7, Workspace: &store.Workspace{ID: "a"}}}, Next: 7}, nil
		}})
		for range 20 {
			stream := must2(client.WatchWorkspaces(t.Context(), &workspacev1.WatchWorkspacesRequest{}))(t)
			if got := fmt.Sprint(show(recvUntil(t, stream, isSynced))); got != "[+a synced]" {
				t.Errorf("got %s", got)
			}
		}
		if n := reads.Load(); n != 1 {
			t.Errorf("%d reads, want 1", n)
		}
	})
}

// TestMalformedRequestIsNotEchoed: gRPC itself refuses what is no message of the
// method's type, as INTERNAL; what it says must not hold a part of it.
func TestMalformedRequestIsNotEchoed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, conn, log := serve(t, server.Config{Store: &faultyStore{}, Hub: make(hints)})
		broken := &emptypb.Empty{} // SetSecretRequest.text is no UTF-8
		broken.ProtoReflect().SetUnknown([]byte("\x12\x08canary\xff\xfe"))
		err := conn.Invoke(t.Context(), workspacev1.WorkspaceControl_SetSecret_FullMethodName, broken, &workspacev1.SetSecretResponse{})
		wantCode(t, err, codes.Internal, "")
		if all := fmt.Sprint(status.Convert(err).Proto(), log); strings.Contains(all, "canary") {
			t.Errorf("it was: %s", all)
		}
		err = conn.Invoke(t.Context(), "/workspace.v1.WorkspaceControl/Nothing", &emptypb.Empty{}, &emptypb.Empty{})
		wantCode(t, err, codes.Unimplemented, "")
	})
}

// TestReadsGoOnWhileDraining, changes do not.
func TestReadsGoOnWhileDraining(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.forChanges()
		synctest.Wait()
		h.Drain()
		h.Drain() // may be repeated
		h.wantUnchanged(func() {
			for rpc, call := range changes(h, "") {
				_, err := call("1")
				wantCode(t, err, codes.Unavailable, "DRAINING")
				if detail[*errdetails.RetryInfo](err).GetRetryDelay().AsDuration() <= 0 {
					t.Errorf("%s: no delay", rpc)
				}
			}
		})
		if err := h.Restart(); err != nil {
			t.Fatal(err)
		}
		if _, err := changes(h, "")["SetModel"]("1"); err != nil {
			t.Errorf("the next one: %v", err)
		}
	})
}
