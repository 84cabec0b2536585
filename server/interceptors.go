package server

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"sync/atomic"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

// UnaryInterceptors are those that NewGRPC chains, outermost first: all know who
// calls, what logs sees the status that the caller gets, what maps errors sees
// panics as errors, and nothing is said of a request whose caller may not make it.
func (s *Server) UnaryInterceptors() []grpc.UnaryServerInterceptor {
	return []grpc.UnaryServerInterceptor{
		s.countUnary,
		s.identifyUnary,
		s.logUnary,
		s.auditUnary,
		s.mapErrorsUnary,
		recovery.UnaryServerInterceptor(recovery.WithRecoveryHandler(panicked)),
		s.limitUnary,
		s.authorizeUnary,
		s.refuseUnary,
		s.validateUnary,
	}
}

func (s *Server) streamInterceptors() []grpc.StreamServerInterceptor {
	return []grpc.StreamServerInterceptor{
		s.identifyStream,
		s.logStream,
		s.auditStream,
		s.mapErrorsStream,
		recovery.StreamServerInterceptor(recovery.WithRecoveryHandler(panicked)),
		s.limitStream,
		s.authorizeStream,
		s.guardStream,
	}
}

// inFlight counts calls.
type inFlight struct {
	n    atomic.Int64
	idle chan struct{} // size 1: n was 0
}

func (f *inFlight) leave() {
	if f.n.Add(-1) == 0 {
		select {
		case f.idle <- struct{}{}:
		default:
		}
	}
}

// wait returns nil once nothing is in flight, or the error of ctx. It is for one
// caller at a time, after which nothing new comes.
func (f *inFlight) wait(ctx context.Context) error {
	for f.n.Load() > 0 {
		select {
		case <-f.idle:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (s *Server) countUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	s.unary.n.Add(1)
	defer s.unary.leave()
	return handler(ctx, req)
}

// panicError is a panic of a handler.
type panicError struct {
	value any
	stack []byte
}

func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.value) }

func panicked(value any) error { return &panicError{value, debug.Stack()} }

// mapError makes the status of a handler's error. What is internal goes to the
// log, and the caller gets the id under which it is found there.
func (s *Server) mapError(ctx context.Context, err error, req any) error {
	if err == nil {
		return nil
	}
	method, _ := grpc.Method(ctx)
	if public := publicError(err, method, req); public != nil {
		return public
	}
	id := callID(ctx)
	attrs := []any{"call_id", id, "method", method, "error", err}
	var inHandler *panicError
	var inStore *store.PanicError
	switch {
	case errors.As(err, &inHandler):
		attrs = append(attrs, "stack", string(inHandler.stack))
	case errors.As(err, &inStore):
		attrs = append(attrs, "stack", string(inStore.Stack))
	}
	s.log.ErrorContext(ctx, "internal error in a call", attrs...)
	return internalError(id)
}

func (s *Server) mapErrorsUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	if err != nil {
		return nil, s.mapError(ctx, err, req)
	}
	return resp, nil
}

func (s *Server) mapErrorsStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	err := handler(srv, stream)
	// Health answers CANCELLED when its stream was ended by guardedStream.
	if status.Code(err) == codes.Canceled && stream.Context().Err() == nil && s.isDraining() {
		err = errDraining
	}
	return s.mapError(stream.Context(), err, nil)
}

// refuseUnary refuses changes while draining.
func (s *Server) refuseUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if s.isDraining() && ours(info.FullMethod) && !s.readOnly[info.FullMethod] {
		return nil, errDraining
	}
	return handler(ctx, req)
}

func (s *Server) validateUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if m, ok := req.(proto.Message); ok && ours(info.FullMethod) {
		if err := validateRequest(m); err != nil {
			return nil, err
		}
	}
	return handler(ctx, req)
}

// ourPrefix is that of the services of our package, and of no others.
const ourPrefix = "/workspace.v1."

// ours reports whether a method is one of WorkspaceControl or AdminControl.
func ours(method string) bool { return strings.HasPrefix(method, ourPrefix) }

func (s *Server) guardStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	return handler(srv, &guardedStream{stream, s, info.FullMethod, ours(info.FullMethod)})
}

// guardedStream checks whether the caller may ask for what comes in, validates it,
// and ends the streams of other services
// while draining, after what they had to say: a health watch that lives on would
// keep GracefulStop waiting.
type guardedStream struct {
	grpc.ServerStream
	server *Server
	method string
	ours   bool
}

func (g *guardedStream) RecvMsg(m any) error {
	if err := g.ServerStream.RecvMsg(m); err != nil {
		return undecodable(err)
	}
	if m, ok := m.(proto.Message); ok && g.ours {
		if err := g.server.authorize(g.Context(), g.method, m); err != nil {
			return err
		}
		return validateRequest(m)
	}
	return nil
}

func (g *guardedStream) SendMsg(m any) error {
	// Who reads slowly gets nothing more after its end.
	if err := access.Ended(g.Context()); err != nil {
		return err
	}
	if err := g.ServerStream.SendMsg(m); err != nil {
		return err
	}
	if !g.ours && g.server.isDraining() {
		return errDraining
	}
	return nil
}
