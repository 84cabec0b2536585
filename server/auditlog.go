package server

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/store"
)

// auditPlace is where a page of the audit log ends.
type auditPlace struct {
	Sequence uint64 `json:"s"`
}

// ListAuditEntries implements workspace.v1.AdminControl.
//
// INVALID_ARGUMENT.
func (a admin) ListAuditEntries(ctx context.Context, req *workspacev1.ListAuditEntriesRequest) (*workspacev1.ListAuditEntriesResponse, error) {
	match, err := auditFilter(req)
	if err != nil {
		return nil, err
	}
	list := append([]string{"audit", a.server.store.InstanceUID()}, auditConditions(req)...)
	var after auditPlace
	if token := req.GetPageToken(); token != "" && !decodeToken(token, &after, list...) {
		return nil, invalid("page_token", "must be the next_page_token of a response to the same request, with the same conditions and order")
	}
	if after.Sequence == 0 {
		// If it can't be written now, the log is read all the same.
		if err := a.server.store.FlushAudit(ctx); err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			a.server.log.WarnContext(ctx, "refused calls are not in the audit log yet", "error", err)
		}
	}
	entries, last, more, err := a.server.store.AuditEntries(after.Sequence, req.GetNewestFirst(), pageSize(req.GetPageSize()), match)
	if err != nil {
		return nil, err
	}
	resp := &workspacev1.ListAuditEntriesResponse{}
	size := 0
	for i := range entries {
		e := auditEntryToProto(&entries[i])
		if size += proto.Size(e); i > 0 && size > maxPageBytes {
			last, more = entries[i-1].Sequence, true
			break
		}
		resp.AuditEntries = append(resp.AuditEntries, e)
	}
	if more {
		resp.NextPageToken = encodeToken(auditPlace{last}, list...)
	}
	return resp, nil
}

// auditConditions is what has to be the same on the next page.
func auditConditions(req *workspacev1.ListAuditEntriesRequest) []string {
	return []string{
		fmt.Sprint(req.GetNewestFirst()), timeText(req.GetStartTime()), timeText(req.GetEndTime()),
		req.GetSubject(), req.GetMethod(), req.GetResource(), req.GetCode(),
	}
}

func timeText(t *timestamppb.Timestamp) string { return fmt.Sprint(t.GetSeconds(), t.GetNanos()) }

// auditFilter returns nil for a request without conditions.
func auditFilter(req *workspacev1.ListAuditEntriesRequest) (func(*store.AuditEntry) bool, error) {
	var vs violations
	for field, t := range map[string]*timestamppb.Timestamp{"start_time": req.GetStartTime(), "end_time": req.GetEndTime()} {
		if t != nil && !t.IsValid() {
			vs.add(field, "must be a time from the year 1 to 9999")
		}
	}
	if err := vs.err(); err != nil {
		return nil, err
	}
	var conditions []func(*store.AuditEntry) bool
	add := func(asked bool, condition func(*store.AuditEntry) bool) {
		if asked {
			conditions = append(conditions, condition)
		}
	}
	start, end := req.GetStartTime().AsTime(), req.GetEndTime().AsTime()
	add(req.GetStartTime() != nil, func(e *store.AuditEntry) bool { return !e.Time.Before(start) || !e.LastTime.Before(start) })
	add(req.GetEndTime() != nil, func(e *store.AuditEntry) bool { return e.Time.Before(end) })
	add(req.GetSubject() != "", func(e *store.AuditEntry) bool { return e.Subject == req.GetSubject() })
	add(req.GetMethod() != "", func(e *store.AuditEntry) bool {
		return e.Method == req.GetMethod() || strings.HasSuffix(e.Method, "/"+req.GetMethod())
	})
	add(req.GetResource() != "", func(e *store.AuditEntry) bool {
		return e.Resource == req.GetResource() || strings.HasPrefix(e.Resource, req.GetResource()+"/")
	})
	add(req.GetCode() != "", func(e *store.AuditEntry) bool { return e.Code == req.GetCode() })
	if len(conditions) == 0 {
		return nil, nil
	}
	return func(e *store.AuditEntry) bool {
		for _, condition := range conditions {
			if !condition(e) {
				return false
			}
		}
		return true
	}, nil
}

// VerifyAuditLog implements workspace.v1.AdminControl.
func (a admin) VerifyAuditLog(ctx context.Context, _ *workspacev1.VerifyAuditLogRequest) (*workspacev1.VerifyAuditLogResponse, error) {
	r, err := a.server.store.VerifyAudit(ctx)
	if err != nil {
		return nil, err
	}
	return &workspacev1.VerifyAuditLogResponse{
		Intact: r.Problems == 0, Problem: r.Problem, ProblemCount: int32(r.Problems),
		FirstSequence: int64(r.First), LastSequence: int64(r.Last), HeadHash: r.Head[:], SizeBytes: r.Bytes,
	}, nil
}

func auditEntryToProto(e *store.AuditEntry) *workspacev1.AuditEntry {
	return &workspacev1.AuditEntry{
		Sequence: int64(e.Sequence), Hash: e.Hash[:], Time: timeToProto(e.Time),
		Subject: e.Subject, Peer: e.Peer, Method: e.Method, Resource: e.Resource, Keys: e.Keys,
		Code: e.Code, Reason: e.Reason,
		Effect:     workspacev1.AuditEffect(workspacev1.AuditEffect_value["AUDIT_EFFECT_"+string(e.Effect)]),
		Generation: e.Generation, RequestId: e.RequestID, CallId: e.CallID,
		Count: e.Calls(), LastTime: timeToProto(e.LastTime),
	}
}
