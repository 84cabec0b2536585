package rows

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

var readRow = Row{
	Name:  "read",
	What:  "GetWorkspace and pages of ListWorkspaces out of 100,000, beside an empty RPC",
	Limit: 90 * time.Second,
	Run: func(ctx context.Context, env *Env) ([]measure.Result, error) {
		return read(ctx, env, readSizes{workspaces: librarySize, page: 100, rounds: 45, gets: 100, lists: 5})
	},
}

// readSizes say how much is measured.
type readSizes struct {
	workspaces, page int
	rounds           int
	gets, lists      int    // a round, of each kind
	slow             func() // nil, or a further step in each reading of the store
}

// What an empty RPC is: gRPC's server and client in this process, as ours are, on
// a unix socket; without interceptors; a request and an answer without a byte.
const emptyRPC = "an empty RPC"

// read measures our server on a unix socket, and a bare one beside it. Its client
// makes one call after the other.
func read(ctx context.Context, env *Env, sizes readSizes) (_ []measure.Result, err error) {
	lib, err := openLibrary(ctx, env, sizes.workspaces)
	if err != nil {
		return nil, err
	}
	st, err := openData(lib.dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	dir, remove, err := env.temp("r")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()

	api := server.New(server.Config{Store: slowStore{st, sizes.slow}, Hub: workspace.NewHub(), Logger: slog.New(slog.DiscardHandler)})
	ours, err := serveSocket(filepath.Join(dir, "ours"), api.NewGRPC(unixCredentials()))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, ours.close()) }()
	ready := &readyAnswers{}
	bare, err := serveSocket(filepath.Join(dir, "bare"), ready.server())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, bare.close()) }()

	client := workspacev1.NewWorkspaceControlClient(ours.conn)
	name := "workspaces/" + libraryID(sizes.workspaces/2)
	get := func() error {
		_, err := client.GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: name})
		return err
	}
	next := sizes.page // in the order of the list, which is read from both ends
	getAnother := func() error {
		next = (next + 1) % sizes.workspaces
		_, err := client.GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: "workspaces/" + libraryID(next)})
		return err
	}
	page := func(token string) (*workspacev1.ListWorkspacesResponse, error) {
		return client.ListWorkspaces(ctx, &workspacev1.ListWorkspacesRequest{PageSize: int32(sizes.page), PageToken: token})
	}
	lastToken, pages, err := lastPage(page)
	if err != nil {
		return nil, err
	}
	if want := sizes.workspaces / sizes.page; pages != want {
		return nil, fmt.Errorf("the list has %d pages, not %d", pages, want)
	}
	listed := func(token string) func() error {
		return func() error {
			resp, err := page(token)
			if err == nil && len(resp.GetWorkspaces()) != sizes.page {
				err = fmt.Errorf("a page of %d", len(resp.GetWorkspaces()))
			}
			return err
		}
	}
	onward := "" // from page to page, round and round
	listAnother := func() error {
		resp, err := page(onward)
		onward = resp.GetNextPageToken()
		return err
	}
	if ready.get, err = client.GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: name}); err != nil {
		return nil, err
	}
	if ready.list, err = page(""); err != nil {
		return nil, err
	}

	var empty, got, gotAnother, gotReady, first, last, another, listReady measure.Samples
	us, ms := time.Microsecond, time.Millisecond
	err = measure.Alternate(ctx, sizes.rounds,
		measure.Timed(&empty, us, sizes.gets, repeat(sizes.gets, func() error { return bare.call(ctx, "Empty", &emptypb.Empty{}) })),
		measure.Timed(&got, us, sizes.gets, repeat(sizes.gets, get)),
		measure.Timed(&gotAnother, us, sizes.gets, repeat(sizes.gets, getAnother)),
		measure.Timed(&gotReady, us, sizes.gets, repeat(sizes.gets, func() error { return bare.call(ctx, "Get", &workspacev1.GetWorkspaceResponse{}) })),
		measure.Timed(&first, ms, sizes.lists, repeat(sizes.lists, listed(""))),
		measure.Timed(&last, ms, sizes.lists, repeat(sizes.lists, listed(lastToken))),
		measure.Timed(&another, ms, sizes.lists, repeat(sizes.lists, listAnother)),
		measure.Timed(&listReady, ms, sizes.lists, repeat(sizes.lists, func() error { return bare.call(ctx, "List", &workspacev1.ListWorkspacesResponse{}) })),
	)
	if err != nil {
		return nil, err
	}
	emptyMs := make(measure.Samples, len(empty))
	for i, v := range empty {
		emptyMs[i] = v / 1000
	}
	const readyMade = "the same answer ready-made, without our interceptors"
	list := fmt.Sprintf("read/list page 1 of %d", pages)
	return []measure.Result{
		measure.Compare("read/get", "µs", got, emptyRPC, empty, measure.RatioAtMost(1.3)),
		measure.Compare("read/get of a known answer", "µs", got, readyMade, gotReady),
		measure.Compare("read/get of another each time", "µs", gotAnother, emptyRPC, empty),
		measure.Compare(list, "ms", first, emptyRPC, emptyMs, measure.MedianAtMost(2)),
		measure.Compare(list+" of a known answer", "ms", first, readyMade, listReady),
		measure.Compare(fmt.Sprintf("read/list page %d", pages), "ms", last, "page 1", first, measure.MedianAtMost(2), measure.RatioAtMost(1.2)),
		measure.Compare("read/list of another page each time", "ms", another, readyMade, listReady),
	}, nil
}

// lastPage goes through the list and returns the token of its last page, and how
// many pages there are.
func lastPage(page func(token string) (*workspacev1.ListWorkspacesResponse, error)) (token string, pages int, err error) {
	for pages = 1; ; pages++ {
		resp, err := page(token)
		if err != nil {
			return "", 0, err
		}
		if resp.GetNextPageToken() == "" {
			return token, pages, nil
		}
		token = resp.GetNextPageToken()
	}
}

// repeat does f n times.
func repeat(n int, f func() error) func() error {
	return func() error {
		for range n {
			if err := f(); err != nil {
				return err
			}
		}
		return nil
	}
}

// slowStore is a store that does something more before it reads.
type slowStore struct {
	*store.Store
	slow func()
}

// SharedWorkspace is the store's.
func (s slowStore) SharedWorkspace(id string) (*store.Shared, error) {
	if s.slow != nil {
		s.slow()
	}
	return s.Store.SharedWorkspace(id)
}

// ListShared is the store's.
func (s slowStore) ListShared(after string, limit int, match func(*store.Workspace) bool) ([]*store.Shared, bool, error) {
	if s.slow != nil {
		s.slow()
	}
	return s.Store.ListShared(after, limit, match)
}

// servedSocket is a gRPC server on a unix socket, and a connection to it.
type servedSocket struct {
	grpc  *grpc.Server
	tasks errgroup.Group
	conn  *grpc.ClientConn
}

func serveSocket(socket string, g *grpc.Server) (*servedSocket, error) {
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	s := &servedSocket{grpc: g}
	s.tasks.Go(func() error { return g.Serve(listener) })
	s.conn, err = grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *servedSocket) close() error {
	if s.conn != nil {
		s.conn.Close()
	}
	s.grpc.Stop()
	return s.tasks.Wait()
}

const readyService = "bench.Ready"

// call calls a method of readyAnswers.
func (s *servedSocket) call(ctx context.Context, method string, answer proto.Message) error {
	return s.conn.Invoke(ctx, "/"+readyService+"/"+method, &emptypb.Empty{}, answer)
}

// readyAnswers are what a server answers that has nothing to do for it.
type readyAnswers struct {
	get  *workspacev1.GetWorkspaceResponse
	list *workspacev1.ListWorkspacesResponse
}

func (r *readyAnswers) server() *grpc.Server {
	method := func(name string, answer func() proto.Message) grpc.MethodDesc {
		return grpc.MethodDesc{
			MethodName: name,
			Handler: func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
				if err := decode(&emptypb.Empty{}); err != nil {
					return nil, err
				}
				return answer(), nil
			},
		}
	}
	g := grpc.NewServer()
	g.RegisterService(&grpc.ServiceDesc{
		ServiceName: readyService, HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{
			method("Empty", func() proto.Message { return &emptypb.Empty{} }),
			method("Get", func() proto.Message { return r.get }),
			method("List", func() proto.Message { return r.list }),
		},
	}, r)
	return g
}
