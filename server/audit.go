package server

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

// The audit log has every call that changes something and every call that is
// refused. A change's handler hands the entry to the store, which writes it in the
// change's own transaction. What an RPC with side effects does without one is
// written, durably, before its caller gets the answer, and without an entry there
// is no answer. Refusals are written a moment later, those that are alike as one.

// unknownMethod stands in the log for methods that there are not: their names are
// the caller's.
const unknownMethod = "unknown"

// maxAuditKeys is how many keys of secrets an entry names.
const maxAuditKeys = 64

// codeNames are the names that google.rpc.Code has for gRPC's codes.
var codeNames = []string{
	"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
	"RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
	"UNAUTHENTICATED",
}

// auditEntry is what is known of a call whoever answers it.
func (s *Server) auditEntry(ctx context.Context, method string) store.AuditEntry {
	e := store.AuditEntry{Method: unknownMethod, Subject: access.SubjectOf(ctx).Name, CallID: callID(ctx)}
	if s.serves(method) {
		e.Method = strings.TrimPrefix(method, "/")
	}
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		e.Peer = p.Addr.String()
	}
	return e
}

// handAudit is the entry of a change that the store makes; its call has none else,
// unless it fails.
func (s *Server) handAudit(ctx context.Context, method, resource string) *store.AuditEntry {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		c.handed = true
	}
	e := s.auditEntry(ctx, method)
	e.Resource = resource
	return &e
}

// auditChange is handAudit for a change of workspaces or secrets.
func (s *Server) auditChange(ctx context.Context, method string, req change) *store.AuditEntry {
	e := s.handAudit(ctx, method, resourceOf(req))
	e.RequestID = req.GetRequestId()
	switch req := req.(type) {
	case *workspacev1.CreateWorkspaceRequest:
		e.Keys = keysOf(req.GetSecrets(), nil)
	case *workspacev1.BatchUpdateSecretsRequest:
		e.Keys = keysOf(req.GetSecrets(), req.GetDeleteKeys())
	}
	return e
}

// keysOf are the first of the keys that a request sets or deletes.
func keysOf(set []*workspacev1.SecretValue, deleted []string) []string {
	var keys []string
	for _, secret := range set {
		keys = append(keys, secret.GetKey())
	}
	keys = append(keys, deleted...)
	return keys[:min(len(keys), maxAuditKeys)]
}

func (s *Server) auditUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	if err := s.auditCall(ctx, info.FullMethod, req, err); err != nil {
		return nil, err
	}
	return resp, err
}

func (s *Server) auditStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	err := handler(srv, stream)
	if failed := s.auditCall(stream.Context(), info.FullMethod, nil, err); failed != nil {
		return failed
	}
	return err
}

// auditCall sees to the entry of a call that ends with err, which is what its
// caller gets. It returns an error when the caller must not get an answer.
func (s *Server) auditCall(ctx context.Context, method string, req any, err error) error {
	code := status.Code(err)
	sideEffects := ours(method) && !s.readOnly[method]
	if err == nil {
		if c, ok := ctx.Value(callKey{}).(*call); !sideEffects || ok && c.handed {
			return nil
		}
	} else if !sideEffects && !refuses(code) {
		return nil
	}
	e := s.auditEntry(ctx, method)
	e.Code = codeNames[codes.Unknown]
	if int(code) < len(codeNames) {
		e.Code = codeNames[code]
	}
	var api *apiError
	if errors.As(err, &api) {
		e.Reason = api.reason
	}
	e.Resource, e.RequestID = namesIn(req)
	if err != nil {
		s.store.AuditLater(e)
		return nil
	}
	if err := s.store.Audit(ctx, e); err != nil {
		return s.mapError(ctx, err, req)
	}
	return nil
}

// refuses tells the codes of calls without side effects that were refused from
// those whose answer is that there is nothing, or that it took too long.
func refuses(code codes.Code) bool {
	switch code {
	case codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument, codes.ResourceExhausted, codes.Unimplemented:
		return true
	default:
		return false
	}
}

// namesIn returns what a request is about, and its id, which may be a bad one:
// names are given only if they are names. Whatever else a caller may have put
// there, a secret's value even, stays out of the log.
func namesIn(req any) (resource, requestID string) {
	resource = resourceOf(req)
	if !resourceName.MatchString(resource) {
		resource = ""
	}
	if req, ok := req.(interface{ GetRequestId() string }); ok && requestIDName.MatchString(req.GetRequestId()) {
		requestID = req.GetRequestId()
	}
	return resource, requestID
}

// TendAudit verifies the audit log and removes what is too old. What is wrong with
// it GetServerInfo tells as well, until a later call finds that it is not any more.
func (s *Server) TendAudit(ctx context.Context) error {
	if err := s.store.PruneAudit(ctx); err != nil {
		return err
	}
	report, err := s.store.VerifyAudit(ctx)
	if err != nil {
		return err
	}
	if before := s.auditProblem.Swap(&report.Problem); before == nil || *before != report.Problem {
		if report.Problem != "" {
			s.log.ErrorContext(ctx, "the audit log is not what was written", "problem", report.Problem, "problems", report.Problems)
		} else if before != nil {
			s.log.InfoContext(ctx, "the audit log is whole again: what was wrong with it was removed with its age")
		}
	}
	return nil
}

// auditProblemFound is what TendAudit has found last to be wrong; empty: nothing.
func (s *Server) auditProblemFound() string {
	if problem := s.auditProblem.Load(); problem != nil {
		return *problem
	}
	return ""
}

// AuditIntact returns an error if TendAudit has found that the audit log is not
// what was written.
func (s *Server) AuditIntact() error {
	if problem := s.auditProblemFound(); problem != "" {
		return errors.New("audit log: " + problem)
	}
	return nil
}
