package rows

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

var interceptorsRow = Row{
	Name:  "interceptors",
	What:  "what the interceptors add to a call, beside the call without them",
	Limit: time.Minute,
	Run: func(ctx context.Context, env *Env) ([]measure.Result, error) {
		return interceptors(ctx, env, interceptorsSizes{rounds: 100, direct: 100, calls: 10})
	},
}

// interceptorsSizes say how much is measured.
type interceptorsSizes struct {
	rounds int
	direct int    // calls of the chain itself a round
	calls  int    // calls over the socket a round
	slow   func() // nil, or a further step in the chain
}

// interceptedCalls are one that only reads, which is not logged at the daemon's
// default level, one that changes, which is, and the one with most to check.
var interceptedCalls = []struct {
	name, method string
	req          proto.Message
	call         func(context.Context, workspacev1.WorkspaceControlClient, proto.Message) error
}{
	{
		"get", workspacev1.WorkspaceControl_GetWorkspace_FullMethodName,
		&workspacev1.GetWorkspaceRequest{Name: "workspaces/shop"},
		func(ctx context.Context, c workspacev1.WorkspaceControlClient, m proto.Message) error {
			_, err := c.GetWorkspace(ctx, m.(*workspacev1.GetWorkspaceRequest))
			return err
		},
	},
	{
		"set", workspacev1.WorkspaceControl_SetSecret_FullMethodName,
		&workspacev1.SetSecretRequest{Name: "workspaces/shop/secrets/API_KEY", Payload: &workspacev1.SetSecretRequest_Text{Text: strings.Repeat("x", 40)}},
		func(ctx context.Context, c workspacev1.WorkspaceControlClient, m proto.Message) error {
			_, err := c.SetSecret(ctx, m.(*workspacev1.SetSecretRequest))
			return err
		},
	},
	{
		"create", workspacev1.WorkspaceControl_CreateWorkspace_FullMethodName,
		&workspacev1.CreateWorkspaceRequest{
			WorkspaceId: "shop",
			Workspace: &workspacev1.Workspace{
				Labels: map[string]string{"team": "a"},
				Spec: &workspacev1.WorkspaceSpec{
					Image:   "registry.example/team/app:1",
					Env:     map[string]string{"LANG": "C.UTF-8", "MODE": "serve"},
					Volumes: []*workspacev1.Volume{{MountPath: "/data", Source: &workspacev1.Volume_VolumeName{VolumeName: "data"}}},
				},
			},
			Secrets: []*workspacev1.SecretValue{{Key: "API_KEY", Payload: &workspacev1.SecretValue_Text{Text: "first"}}},
		},
		func(ctx context.Context, c workspacev1.WorkspaceControlClient, m proto.Message) error {
			_, err := c.CreateWorkspace(ctx, m.(*workspacev1.CreateWorkspaceRequest))
			return err
		},
	},
}

// answers is a service whose handlers do nothing.
type answers struct {
	workspacev1.UnimplementedWorkspaceControlServer
}

func (answers) GetWorkspace(context.Context, *workspacev1.GetWorkspaceRequest) (*workspacev1.GetWorkspaceResponse, error) {
	return &workspacev1.GetWorkspaceResponse{}, nil
}

func (answers) SetSecret(context.Context, *workspacev1.SetSecretRequest) (*workspacev1.SetSecretResponse, error) {
	return &workspacev1.SetSecretResponse{}, nil
}

func (answers) CreateWorkspace(context.Context, *workspacev1.CreateWorkspaceRequest) (*workspacev1.CreateWorkspaceResponse, error) {
	return &workspacev1.CreateWorkspaceResponse{}, nil
}

// noStore stands for the store: the handlers change nothing, and so nothing is
// written, which is a commit's cost and not the interceptors'.
type noStore struct{ server.Store }

func (noStore) Audit(context.Context, store.AuditEntry) error { return nil }

// interceptors calls the chain of the daemon, with its log at the default level
// in a file, over a handler that does nothing: the exact figure. Then the same
// handlers over a socket, with the chain and without: the check.
func interceptors(ctx context.Context, env *Env, sizes interceptorsSizes) (_ []measure.Result, err error) {
	dir, remove, err := env.temp("icept")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	chain := server.New(server.Config{Store: noStore{}, Logger: slog.New(slog.NewTextHandler(log, nil))}).UnaryInterceptors()
	if sizes.slow != nil {
		chain = append(chain, func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			sizes.slow()
			return handler(ctx, req)
		})
	}
	with, stopWith, err := serveAnswers(filepath.Join(dir, "with"), unixCredentials(), grpc.ChainUnaryInterceptor(chain...))
	if err != nil {
		return nil, err
	}
	defer stopWith()
	without, stopWithout, err := serveAnswers(filepath.Join(dir, "without"))
	if err != nil {
		return nil, err
	}
	defer stopWithout()

	var results []measure.Result
	for _, c := range interceptedCalls {
		chained, handler := direct(chain, c.method)
		callCtx, cancel := context.WithTimeout(incoming(ctx, c.method), time.Minute)
		var ours, bare, callWith, callWithout measure.Samples
		err := measure.Alternate(ctx, sizes.rounds,
			each(&ours, sizes.direct, func() error { _, err := chained(callCtx, c.req); return err }),
			each(&bare, sizes.direct, func() error { _, err := handler(callCtx, c.req); return err }),
			each(&callWith, sizes.calls, func() error { return c.call(ctx, with, c.req) }),
			each(&callWithout, sizes.calls, func() error { return c.call(ctx, without, c.req) }))
		if err == nil {
			for i := range ours {
				ours[i] -= bare.Median()
			}
			var allocs, allocsCall measure.Samples
			err = errors.Join(
				mallocs(&allocs, sizes.direct, func() error { _, err := chained(callCtx, c.req); return err }),
				mallocs(&allocsCall, sizes.direct, func() error { return c.call(ctx, without, c.req) }))
			results = append(results,
				measure.Compare("interceptors/"+c.name, "µs", ours, "the call without them over a unix socket", callWithout, measure.MedianAtMost(20)),
				measure.Compare("interceptors/"+c.name+" over a socket", "µs", callWith, "the call without them", callWithout),
				measure.Compare("interceptors/"+c.name+" allocations", "each", allocs, "the call without them, client and server", allocsCall))
		}
		cancel()
		if err != nil {
			return results, fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return results, nil
}

// each is a side that adds how long each of n calls took, in µs.
func each(into *measure.Samples, n int, f func() error) func() error {
	one := measure.Timed(into, time.Microsecond, 1, f)
	return func() error {
		for range n {
			if err := one(); err != nil {
				return err
			}
		}
		return nil
	}
}

// mallocs adds how many allocations one of n calls makes.
func mallocs(into *measure.Samples, n int, f func() error) error {
	var before, after goruntime.MemStats
	goruntime.ReadMemStats(&before)
	for range n {
		if err := f(); err != nil {
			return err
		}
	}
	goruntime.ReadMemStats(&after)
	*into = append(*into, float64(after.Mallocs-before.Mallocs)/float64(n))
	return nil
}

// direct returns the chained handler of a method as gRPC makes it, and the bare
// one.
func direct(chain []grpc.UnaryServerInterceptor, method string) (chained, bare grpc.UnaryHandler) {
	info := &grpc.UnaryServerInfo{FullMethod: method}
	bare = func(context.Context, any) (any, error) { return &workspacev1.GetWorkspaceResponse{}, nil }
	chained = bare
	for i := len(chain) - 1; i >= 0; i-- {
		next := chained
		chained = func(ctx context.Context, req any) (any, error) { return chain[i](ctx, req, info, next) }
	}
	return chained, bare
}

// incoming makes the context that a call has in a server.
func incoming(ctx context.Context, method string) context.Context {
	ctx = grpc.NewContextWithServerTransportStream(ctx, methodStream(method))
	return peer.NewContext(ctx, &peer.Peer{
		Addr:     &net.UnixAddr{Net: "unix", Name: "@"},
		AuthInfo: access.NewAuthInfo(access.Everything("unix:uid=0")),
	})
}

// methodStream is a grpc.ServerTransportStream that knows its method only.
type methodStream string

func (m methodStream) Method() string             { return string(m) }
func (methodStream) SetHeader(metadata.MD) error  { return nil }
func (methodStream) SendHeader(metadata.MD) error { return nil }
func (methodStream) SetTrailer(metadata.MD) error { return nil }

// serveAnswers serves answers on a unix socket.
func serveAnswers(socket string, options ...grpc.ServerOption) (_ workspacev1.WorkspaceControlClient, stop func(), err error) {
	g := grpc.NewServer(options...)
	workspacev1.RegisterWorkspaceControlServer(g, answers{})
	stopServer, err := serveOn(g, socket)
	if err != nil {
		return nil, nil, err
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		stopServer()
		return nil, nil, err
	}
	stop = func() {
		_ = conn.Close() // nothing depends on it any more
		stopServer()
	}
	return workspacev1.NewWorkspaceControlClient(conn), stop, nil
}

// serveOn serves on a unix socket until stop, which waits for the end.
func serveOn(g *grpc.Server, socket string) (stop func(), err error) {
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = g.Serve(listener) // it ends when stopped; callers see any other end
	}()
	return func() { g.Stop(); <-served }, nil
}
