// Package server is the gRPC API: it validates requests, converts them, calls
// the store and maps errors to status codes, once. It starts no container and
// waits for none: what a change needs is done by the workspace's actor, which
// hears of it from the store (see store.Config.OnCommit).
package server

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	encodingproto "google.golang.org/grpc/encoding/proto" // registers what codec is made from
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

// Store is what the server needs of *store.Store.
type Store interface {
	InstanceUID() string
	Revision() uint64
	Workspace(id string) (store.Workspace, error)
	SharedWorkspace(id string) (*store.Shared, error)
	ListWorkspaces(after string, limit int, match func(*store.Workspace) bool) ([]store.Workspace, bool, error)
	ListShared(after string, limit int, match func(*store.Workspace) bool) ([]*store.Shared, bool, error)
	Secret(scope store.Scope, key string) (store.Secret, error)
	Snapshot(id string) (store.Snapshot, error) // FetchSecrets' alone: nothing else has values
	ListSecrets(scope store.Scope, after string, limit int) ([]store.Secret, bool, error)
	ListSecretVersions(scope store.Scope, key string, below int64, limit int) ([]store.SecretVersion, bool, error)
	FeedSince(since, after uint64, limit int) (store.FeedPage, error)
	CreateWorkspace(ctx context.Context, w store.NewWorkspace, o store.Options) (store.Result, error)
	UpdateWorkspace(ctx context.Context, id string, edit func(*store.Editable) error, o store.Options) (store.Result, error)
	DeleteWorkspace(ctx context.Context, id string, keepVolumes bool, o store.Options) (store.Result, error)
	RestartWorkspace(ctx context.Context, id string, o store.Options) (store.Result, error)
	StopWorkspace(ctx context.Context, id string, o store.Options) (store.Result, error)
	StartWorkspace(ctx context.Context, id string, o store.Options) (store.Result, error)
	UpdateSecrets(ctx context.Context, scope store.Scope, u store.SecretsUpdate, o store.Options) (store.Result, error)
	SetVersionState(ctx context.Context, scope store.Scope, key string, version int64, state store.VersionState, o store.Options) (store.Result, error)
	RotateKey(ctx context.Context, o store.Options) (store.Result, error)
	Keys(ctx context.Context) (store.Keys, error)
	Audit(ctx context.Context, e store.AuditEntry) error
	AuditLater(e store.AuditEntry)
	FlushAudit(ctx context.Context) error
	PruneAudit(ctx context.Context) error
	VerifyAudit(ctx context.Context) (store.AuditReport, error)
	AuditEntries(after uint64, down bool, limit int, match func(*store.AuditEntry) bool) (entries []store.AuditEntry, last uint64, more bool, err error)
}

// Hub is what the server needs of *workspace.Hub: hints that something about a
// workspace ("" is any) was committed. Subscribe first, then read the store.
type Hub interface {
	Watch(id string) (hint <-chan struct{}, stop func())
}

// Config is what a Server is made from.
type Config struct {
	Store  Store
	Hub    Hub
	Logger *slog.Logger // never sees a payload
	// Version is the daemon's, for GetServerInfo.
	Version string
	// Authenticator tells who calls; nil: whom the connection's credentials name, see
	// NewGRPC.
	Authenticator *access.Authenticator
	// Health and Reflection say who may call these services.
	Health, Reflection access.Exposure
	// SpecPolicy says what specs may ask of the machine.
	SpecPolicy runtime.Policy
	// Limits are what one caller can take; zero: as much as it likes.
	Limits Limits
}

// Limits of a call.
const (
	// MaxRequestBytes is the size of a request, well above all the secrets that a
	// workspace can have.
	MaxRequestBytes = 4 << 20
	// maxHeaderBytes is the size of a call's metadata.
	maxHeaderBytes = 64 << 10
	// streamWindow and connWindow are how much of a call, and of all calls of a
	// connection, may be on its way to us.
	streamWindow = 256 << 10
	connWindow   = 1 << 20
	// MaxWait is how long WaitWorkspace waits at most.
	MaxWait = time.Hour
)

// Server serves workspace.v1.WorkspaceControl and AdminControl, health and
// reflection.
type Server struct {
	// A missing RPC does not compile.
	workspacev1.UnsafeWorkspaceControlServer

	store    Store
	hub      Hub
	log      *slog.Logger
	health   *health.Server
	readOnly map[string]bool // full names of methods without side effects
	feed     feed
	version  string
	started  time.Time
	authn    *access.Authenticator
	policy   access.Policy
	specs    runtime.Policy
	// Services that are not ours.
	healthOff, reflectionOff bool

	auditProblem atomic.Pointer[string] // found last; nil: nobody has looked
	limits       *limiter

	containers containers
	recordWait time.Duration

	drainOnce sync.Once
	draining  chan struct{} // closed by Drain
	unary     inFlight
}

var _ workspacev1.WorkspaceControlServer = (*Server)(nil)

// New makes a server. It owns no goroutine.
func New(cfg Config) *Server {
	s := &Server{
		store:    cfg.Store,
		hub:      cfg.Hub,
		log:      cfg.Logger,
		health:   health.NewServer(),
		readOnly: readOnlyMethods(),
		feed:     feed{store: cfg.Store},
		version:  cfg.Version,
		specs:    cfg.SpecPolicy,
		started:  time.Now(),
		draining: make(chan struct{}),
		unary:    inFlight{idle: make(chan struct{}, 1)},
		authn:    cfg.Authenticator,
		policy:   make(access.Policy),
		limits:   newLimiter(cfg.Limits),

		healthOff:     cfg.Health == access.ExposureOff,
		reflectionOff: cfg.Reflection == access.ExposureOff,
	}
	s.recordWait = recordWait
	s.containers = containers{known: make(map[string]*containerState), gone: func(id string) bool {
		_, err := s.store.Workspace(id)
		return errors.Is(err, store.ErrNotFound)
	}}
	if s.authn == nil {
		s.authn = new(access.Authenticator)
	}
	s.expose(cfg.Health, healthv1.File_grpc_health_v1_health_proto)
	s.expose(cfg.Reflection, reflectionv1.File_grpc_reflection_v1_reflection_proto, reflectionv1alpha.File_grpc_reflection_v1alpha_reflection_proto)
	for _, service := range services() {
		s.policy.Declare(service)
		s.health.SetServingStatus(string(service.FullName()), healthv1.HealthCheckResponse_SERVING)
	}
	return s
}

// newGRPC makes a gRPC server with the interceptors and limits of s, and no
// services. The options come on top.
func (s *Server) newGRPC(options []grpc.ServerOption) *grpc.Server {
	options = append([]grpc.ServerOption{
		grpc.ChainUnaryInterceptor(s.UnaryInterceptors()...),
		grpc.ChainStreamInterceptor(s.streamInterceptors()...),
		grpc.MaxRecvMsgSize(MaxRequestBytes),
		grpc.MaxConcurrentStreams(10_000), // a connection may carry a wait for each of many workspaces
		// Until then a connection has to have said that it speaks HTTP/2.
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		// Windows that grow with the connection cost a ping and its answer each call. These
		// bound as well what a client can send that nobody reads yet.
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
		grpc.UnknownServiceHandler(s.unknownRPC),
		grpc.ForceServerCodecV2(codec{encoding.GetCodecV2(encodingproto.Name)}),
		// Clients may ping every 10 s, also while only a watch is idle.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		// A peer that vanished is noticed, and its watches end, within 80 s. One without
		// a call for half an hour connects again with its next one.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second, MaxConnectionIdle: 30 * time.Minute}),
	}, options...)
	return grpc.NewServer(options...)
}

// NewGRPC makes a gRPC server with the interceptors, limits and services of s.
// The options come on top. Among them have to be credentials of the package
// access: without them every caller is nobody.
func (s *Server) NewGRPC(options ...grpc.ServerOption) *grpc.Server {
	g := s.newGRPC(options)
	r := registrar{g, s}
	workspacev1.RegisterWorkspaceControlServer(r, s)
	workspacev1.RegisterAdminControlServer(r, admin{server: s})
	if !s.healthOff {
		healthv1.RegisterHealthServer(r, s.health)
	}
	if !s.reflectionOff {
		reflection.Register(r) // v1 and v1alpha
	}
	return g
}

// Drain makes health NOT_SERVING, ends watches and waits, and refuses changes;
// reading goes on. It returns at once, may be called more than once, and is
// followed by Shutdown.
func (s *Server) Drain() {
	s.drainOnce.Do(func() {
		// First: a health watch ends after it has told of NOT_SERVING, if the
		// server drains by then. It is not told a second time.
		close(s.draining)
		s.health.Shutdown()
	})
}

// streamGrace is how long streams have to tell their clients of a shutdown.
const streamGrace = time.Second

// Shutdown drains and stops the gRPC servers that s has made. Calls in flight
// may finish until ctx ends. Streams have ended with Drain, all but those whose
// clients do not read: they are not waited for. It reports whether every call
// was finished.
func (s *Server) Shutdown(ctx context.Context, gs ...*grpc.Server) bool {
	s.Drain()
	graceful := make(chan struct{})
	go func() {
		defer close(graceful)
		var wg sync.WaitGroup
		for _, g := range gs {
			wg.Go(g.GracefulStop)
		}
		wg.Wait()
	}()
	finished := s.unary.wait(ctx) == nil
	grace := time.NewTimer(streamGrace)
	defer grace.Stop()
	select {
	case <-graceful:
	case <-grace.C:
	case <-ctx.Done():
	}
	for _, g := range gs {
		g.Stop()
	}
	<-graceful
	return finished
}

func (s *Server) isDraining() bool {
	select {
	case <-s.draining:
		return true
	default:
		return false
	}
}

// services are those of this package, in the order of their names.
func services() []protoreflect.ServiceDescriptor {
	return []protoreflect.ServiceDescriptor{
		workspacev1.File_workspace_v1_admin_control_proto.Services().ByName("AdminControl"),
		workspacev1.File_workspace_v1_workspace_control_proto.Services().ByName("WorkspaceControl"),
	}
}

// readOnlyMethods are those that the .proto calls NO_SIDE_EFFECTS.
func readOnlyMethods() map[string]bool {
	names := make(map[string]bool)
	for _, service := range services() {
		methods := service.Methods()
		for i := range methods.Len() {
			m := methods.Get(i)
			options, _ := m.Options().(*descriptorpb.MethodOptions)
			if options.GetIdempotencyLevel() == descriptorpb.MethodOptions_NO_SIDE_EFFECTS {
				names[access.FullMethod(m)] = true
			}
		}
	}
	return names
}
