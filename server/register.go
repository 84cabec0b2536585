package server

import (
	"context"
	"fmt"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// registrar registers services so that a unary call is held to its caller's limits
// before gRPC reads the request, and that what gRPC can't make a request of goes
// through the interceptors as well, which log it and write it into the audit log:
// by itself gRPC would answer before any of them sees it.
type registrar struct {
	*grpc.Server
	server *Server
}

// RegisterService implements grpc.ServiceRegistrar.
func (r registrar) RegisterService(desc *grpc.ServiceDesc, impl any) {
	own := *desc
	own.Methods = slices.Clone(desc.Methods)
	for i := range own.Methods {
		m := &own.Methods[i]
		next := m.Handler
		info := &grpc.UnaryServerInfo{Server: impl, FullMethod: fmt.Sprintf("/%s/%s", desc.ServiceName, m.MethodName)}
		m.Handler = func(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
			growStack()
			ctx, c, p, err := r.server.arrive(ctx, info.FullMethod)
			if err == nil {
				defer r.server.limits.leave(p)
				var resp any
				resp, err = next(srv, ctx, func(req any) error {
					c.refused = undecodable(decode(req))
					return c.refused
				}, interceptor)
				if c.refused == nil {
					return resp, err
				}
			} else {
				c.refused = err
			}
			return interceptor(ctx, nil, info, func(context.Context, any) (any, error) { return nil, errNoRequest })
		}
	}
	r.Server.RegisterService(&own, impl)
}

// callStack is what a call needs of its goroutine's stack, about: gRPC starts one for
// each.
const callStack = 10 << 10

// growStack makes the stack that large at once. By itself it grows step by step, and
// is copied in the depth of interceptors and handler, where there is much to copy: a
// sixth of the time that a GetWorkspace takes.
//
//go:noinline
func growStack() {
	var room [callStack]byte
	useStack(&room)
}

// useStack keeps the compiler from leaving the room out.
//
//go:noinline
func useStack(*[callStack]byte) {}

// undecodable says what is wrong with a request that gRPC has refused: for log and
// audit log where the caller has gRPC's own code and words already, which is so but
// for streams.
func undecodable(err error) error {
	switch status.Code(err) {
	case codes.ResourceExhausted:
		return &apiError{
			code: codes.ResourceExhausted, reason: ReasonRequestTooLarge,
			message: fmt.Sprintf("the request is larger than %d bytes", MaxRequestBytes),
		}
	case codes.Internal:
		return &apiError{
			code: codes.InvalidArgument, reason: ReasonMalformed,
			message: "the request is not a message of this method: it can't be parsed",
		}
	}
	return err // nil, or the caller went away
}

// unknownRPC answers calls of methods that there are not, as gRPC would, so that
// they go through the interceptors.
func (s *Server) unknownRPC(_ any, stream grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(stream)
	return &apiError{
		code: codes.Unimplemented, reason: ReasonUnknownMethod,
		message: fmt.Sprintf("there is no method %s", shorten(method, maxFieldBytes)),
	}
}
