package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/reflect/protoreflect"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

// expose says who may call the services in these files.
func (s *Server) expose(exposure access.Exposure, files ...protoreflect.FileDescriptor) {
	for _, file := range files {
		services := file.Services()
		for i := range services.Len() {
			s.policy.Expose(services.Get(i), exposure)
		}
	}
}

// identifyUnary finds out who calls. It refuses nobody: the call is logged first.
// What only reads, and may wait for long, ends with its caller's credentials; a
// change that was begun is finished.
func (s *Server) identifyUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if !hasArrived(ctx) {
		ctx = access.WithIdentity(ctx, s.authn.Identify(ctx))
	}
	if s.readOnly[info.FullMethod] {
		held, release := s.authn.Hold(ctx, access.IdentityOf(ctx))
		defer release()
		ctx = held
	}
	return handler(ctx, req)
}

func (s *Server) identifyStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	id := s.authn.Identify(stream.Context())
	ctx, release := s.authn.Hold(access.WithIdentity(stream.Context(), id), id)
	defer release()
	return handler(srv, &streamWithContext{stream, ctx})
}

// authorizeUnary refuses a call that its caller may not make, before anything else
// is said of it.
func (s *Server) authorizeUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if err := s.authorize(ctx, info.FullMethod, req); err != nil {
		return nil, err
	}
	resp, err := handler(ctx, req)
	if ended := access.Ended(ctx); ended != nil { // whoever has not noticed while it read
		return nil, ended
	}
	return resp, err
}

// authorizeStream is authorizeUnary without the request, which comes later: see
// guardedStream. A stream that is told to end because its caller's credentials
// have ended says so.
func (s *Server) authorizeStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if !s.serves(info.FullMethod) {
		return handler(srv, stream) // unknownRPC, which tells everybody the same
	}
	if _, err := s.policy.Admit(info.FullMethod, access.IdentityOf(stream.Context())); err != nil {
		return err
	}
	err := handler(srv, stream)
	if err != nil {
		return cmp.Or(access.Ended(stream.Context()), err)
	}
	return nil
}

// serves reports whether NewGRPC has registered the method.
func (s *Server) serves(method string) bool {
	rule := s.policy[method]
	return rule != nil && rule.Exposure != access.ExposureOff
}

// authorize refuses a request that its caller may not make. It looks at no more of
// it than whom it is about, and says nothing of whether that exists.
func (s *Server) authorize(ctx context.Context, method string, req any) error {
	id := access.IdentityOf(ctx)
	rule, err := s.policy.Admit(method, id)
	if err != nil || rule.Exposure != "" {
		return err
	}
	if err := s.checkScope(&id.Subject, rule, req); err != nil {
		return err
	}
	if create, ok := req.(*workspacev1.CreateWorkspaceRequest); ok && len(create.GetSecrets()) > 0 {
		return access.Allowed(ctx, workspacev1.Role_ROLE_SECRET_WRITER, newTarget(create))
	}
	return nil
}

// checkScope refuses a request about something for which the subject has none of
// the rule's roles.
func (s *Server) checkScope(subject *access.Subject, rule *access.Rule, req any) error {
	everywhere := rule.Check(subject, access.Target{})
	if everywhere == nil || rule.Target == workspacev1.AccessTarget_ACCESS_TARGET_FILTERED {
		return nil
	}
	if rule.Target != workspacev1.AccessTarget_ACCESS_TARGET_WORKSPACE {
		return everywhere
	}
	if create, ok := req.(*workspacev1.CreateWorkspaceRequest); ok {
		return rule.Check(subject, newTarget(create))
	}
	t := access.Target{ID: workspaceIDOf(resourceOf(req))}
	err := rule.Check(subject, t)
	if err == nil || !rule.View(subject).ShowsID(t.ID) {
		return err
	}
	w, found := s.store.SharedWorkspace(t.ID) // its labels decide
	switch {
	case found == nil:
		return rule.Check(subject, access.TargetOf(&w.Workspace))
	case errors.Is(found, store.ErrNotFound):
		return err
	}
	return found
}

// madeID stands for the ids that newWorkspaceID makes where scopes are compared.
const madeID = madePrefix + "*"

// newTarget is the workspace that a request would make.
func newTarget(req *workspacev1.CreateWorkspaceRequest) access.Target {
	return access.Target{ID: cmp.Or(req.GetWorkspaceId(), madeID), Labels: req.GetWorkspace().GetLabels()}
}

// workspaceIDOf is the id in a resource's name; empty: it has none.
func workspaceIDOf(name string) string {
	rest, ok := strings.CutPrefix(name, workspacesPrefix)
	if !ok {
		return ""
	}
	id, _, _ := strings.Cut(rest, "/")
	return id
}

// view is what the caller may call the method about.
func (s *Server) view(ctx context.Context, method string) access.View {
	rule := s.policy[method]
	if rule == nil {
		return access.View{}
	}
	return rule.View(&access.IdentityOf(ctx).Subject)
}

// allow is what a change's transaction asks about the workspace as it is then: what
// authorize has seen may have changed. nil: nothing that can change matters.
func (s *Server) allow(ctx context.Context, method string) func(*store.Workspace) error {
	if !s.view(ctx, method).ByLabel() {
		return nil
	}
	subject, rule := &access.IdentityOf(ctx).Subject, s.policy[method]
	return func(w *store.Workspace) error { return rule.Check(subject, access.TargetOf(w)) }
}

// checkRead is allow for what was read.
func (s *Server) checkRead(ctx context.Context, method string, w *store.Workspace) error {
	if in := access.IdentityOf(ctx).Subject.Instance; in != nil {
		if err := in.Check(w); err != nil { // it has ended while it waited
			return err
		}
	}
	if allow := s.allow(ctx, method); allow != nil {
		return allow(w)
	}
	return nil
}

// unauthenticatedError tells the caller no more than what kind of credentials
// counted for nothing: a guessed token must not be told from an old one.
func unauthenticatedError(e *access.UnauthenticatedError) error {
	if e.Token {
		return &apiError{
			code:    codes.Unauthenticated,
			reason:  ReasonTokenInvalid,
			message: "the token is not valid: it must be sent as `authorization: Bearer TOKEN`, and be neither expired nor revoked",
		}
	}
	return &apiError{
		code:    codes.Unauthenticated,
		reason:  ReasonNoCredentials,
		message: "the call has no valid credentials: use the unix socket, a client certificate or a token",
	}
}

// deniedError names the role that is missing and the RPC.
func deniedError(e *access.DeniedError, method string) error {
	method = strings.TrimPrefix(method, "/")
	out := &apiError{
		code:     codes.PermissionDenied,
		reason:   ReasonRoleMissing,
		message:  fmt.Sprintf("%s: %v", method, e),
		metadata: map[string]string{"method": method, "subject": shorten(e.Subject, maxFieldBytes)},
	}
	var roles []string
	for _, r := range e.Roles {
		roles = append(roles, access.RoleName(r))
	}
	switch {
	case len(roles) == 0:
		out.reason = ReasonNotServed
		return out
	case e.Elsewhere:
		out.reason = ReasonOutOfScope
	}
	out.metadata["role"] = strings.Join(roles, ",")
	if e.Target.ID != "" {
		out.metadata["resource"] = shorten(workspaceName(e.Target.ID), maxFieldBytes)
	}
	out.message = shorten(out.message, maxDescriptionBytes)
	return out
}
