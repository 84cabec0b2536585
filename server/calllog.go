package server

import (
	"context"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/workspaced/workspaced/server/access"
)

// callKey is the context's key for a call's id.
type callKey struct{}

// call has its id, once somebody has asked for it: most calls are logged nowhere.
// It belongs to the goroutine of the call.
type call struct {
	id     string
	handed bool // the store has its entry for the audit log
	// arrived: arrive has looked at who calls.
	arrived bool
	// refused is why there is no request; nil: there is one.
	refused error
}

// callID is the id under which the log knows a call.
func callID(ctx context.Context) string {
	c, ok := ctx.Value(callKey{}).(*call)
	if !ok {
		return ""
	}
	if c.id == "" {
		c.id = uuid.NewString()
	}
	return c.id
}

func hasArrived(ctx context.Context) bool {
	c, ok := ctx.Value(callKey{}).(*call)
	return ok && c.arrived
}

func (s *Server) logUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	begin := time.Now()
	if !hasArrived(ctx) {
		ctx = context.WithValue(ctx, callKey{}, &call{})
	}
	resp, err := handler(ctx, req)
	s.logCall(ctx, info.FullMethod, "unary", begin, err)
	return resp, err
}

func (s *Server) logStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	begin := time.Now()
	ctx := context.WithValue(stream.Context(), callKey{}, &call{})
	err := handler(srv, &streamWithContext{stream, ctx})
	kind := "bidi_stream"
	if !info.IsClientStream {
		kind = "server_stream"
	}
	s.logCall(ctx, info.FullMethod, kind, begin, err)
	return err
}

type streamWithContext struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *streamWithContext) Context() context.Context { return s.ctx }

// logCall logs a call that has ended, never its payload. What it says is made
// only if somebody will read it.
func (s *Server) logCall(ctx context.Context, method, kind string, begin time.Time, err error) {
	took := time.Since(begin)
	code := status.Code(err)
	level := s.levelOf(method, code)
	if !s.log.Enabled(ctx, level) {
		return
	}
	service, name, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	attrs := make([]slog.Attr, 0, 14)
	add := func(key, value string) { attrs = append(attrs, slog.String(key, value)) }
	add("protocol", "grpc")
	add("grpc.component", "server")
	add("grpc.service", service)
	add("grpc.method", name)
	add("grpc.method_type", kind)
	add("call_id", callID(ctx))
	if p, ok := peer.FromContext(ctx); ok {
		add("peer.address", p.Addr.String())
	}
	id := access.IdentityOf(ctx)
	if id.Subject.Name != "" {
		add("subject", id.Subject.Name)
	}
	if id.Err != nil {
		add("unauthenticated", id.Err.Why)
	}
	add("grpc.start_time", begin.Format(time.RFC3339))
	if deadline, ok := ctx.Deadline(); ok {
		add("grpc.request.deadline", deadline.Format(time.RFC3339))
	}
	add("grpc.code", code.String())
	if err != nil {
		add("grpc.error", err.Error())
	}
	add("grpc.time_ms", strconv.FormatFloat(float64(took.Microseconds())/1000, 'f', -1, 64))
	s.log.LogAttrs(ctx, level, "finished call", attrs...)
}

// levelOf: changes are logged at INFO and what only reads at DEBUG; errors at the
// level of their code.
func (s *Server) levelOf(method string, code codes.Code) slog.Level {
	switch code {
	case codes.OK:
		if ours(method) && !s.readOnly[method] {
			return slog.LevelInfo
		}
		return slog.LevelDebug
	case codes.Internal, codes.Unknown, codes.DataLoss:
		return slog.LevelError
	case codes.Unimplemented:
		if s.serves(method) {
			return slog.LevelError
		}
	case codes.ResourceExhausted:
		return slog.LevelWarn
	}
	return slog.LevelInfo
}
