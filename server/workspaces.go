package server

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/proto"

	"go.einride.tech/aip/ordering"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

// change is what the requests of all changes have in common.
type change interface {
	proto.Message
	GetRequestId() string
	GetValidateOnly() bool
}

// options are a change's options, with its entry for the audit log. The
// fingerprint is of the method and the whole request: no two requests that differ
// have the same.
func (s *Server) options(ctx context.Context, method string, req change, etag string) (store.Options, error) {
	o := store.Options{
		RequestID: req.GetRequestId(), ValidateOnly: req.GetValidateOnly(), Etag: etag,
		Allow: s.allow(ctx, method), Audit: s.auditChange(ctx, method, req),
	}
	if o.RequestID == "" {
		return o, nil
	}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(req)
	if err != nil {
		return store.Options{}, fmt.Errorf("marshal %s for its fingerprint: %w", req.ProtoReflect().Descriptor().FullName(), err)
	}
	o.Fingerprint = append([]byte(method+"\x00"), body...)
	return o, nil
}

// CreateWorkspace implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, ALREADY_EXISTS, FAILED_PRECONDITION, RESOURCE_EXHAUSTED,
// UNAVAILABLE.
func (s *Server) CreateWorkspace(ctx context.Context, req *workspacev1.CreateWorkspaceRequest) (*workspacev1.CreateWorkspaceResponse, error) {
	o, err := s.options(ctx, workspacev1.WorkspaceControl_CreateWorkspace_FullMethodName, req, "")
	if err != nil {
		return nil, err
	}
	id := req.GetWorkspaceId()
	if id == "" {
		id = newWorkspaceID()
		o.Audit.Resource = workspaceName(id)
	}
	spec := specFromProto(req.GetWorkspace().GetSpec())
	if err := s.admit(ctx, workspaceName(id), nil, &spec); err != nil {
		return nil, err
	}
	r, err := s.store.CreateWorkspace(ctx, store.NewWorkspace{
		ID:      id,
		Labels:  cloneMap(req.GetWorkspace().GetLabels()),
		Spec:    spec,
		Model:   req.GetWorkspace().GetModel(),
		Secrets: secretsFromProto(req.GetSecrets()),
	}, o)
	if err != nil {
		return nil, err
	}
	return &workspacev1.CreateWorkspaceResponse{
		Workspace:  workspaceToProto(&r.Workspace),
		Generation: r.Workspace.Generation,
		Changed:    r.Changed,
	}, nil
}

// GetWorkspace implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND.
func (s *Server) GetWorkspace(ctx context.Context, req *workspacev1.GetWorkspaceRequest) (*workspacev1.GetWorkspaceResponse, error) {
	id, err := parseWorkspaceName("name", req.GetName())
	if err != nil {
		return nil, err
	}
	w, err := s.store.SharedWorkspace(id)
	if err == nil {
		err = s.checkRead(ctx, workspacev1.WorkspaceControl_GetWorkspace_FullMethodName, &w.Workspace)
	}
	if err != nil {
		return nil, err
	}
	encoding, err := s.encode(ctx, w)
	if err != nil {
		return nil, err
	}
	resp := &workspacev1.GetWorkspaceResponse{}
	setEncoded(resp, workspaceField, encoding)
	return resp, nil
}

// ListWorkspaces implements workspace.v1.WorkspaceControl. By name a page costs
// the same wherever it is in the list; in another order each page looks at every
// workspace. One that changes between two pages may move in an order by
// update_time.
//
// INVALID_ARGUMENT.
func (s *Server) ListWorkspaces(ctx context.Context, req *workspacev1.ListWorkspacesRequest) (*workspacev1.ListWorkspacesResponse, error) {
	f, err := parseFilter(req.GetFilter())
	if err != nil {
		return nil, err
	}
	order, err := parseOrder(req.GetOrderBy())
	if err != nil {
		return nil, err
	}
	list := []string{"workspaces", s.store.InstanceUID(), req.GetFilter(), req.GetOrderBy()}
	after, err := decodeCursor(req.GetPageToken(), list...)
	if err != nil {
		return nil, err
	}
	match := visible(f, s.view(ctx, workspacev1.WorkspaceControl_ListWorkspaces_FullMethodName))
	page, more, err := s.listWorkspaces(match, order, after, pageSize(req.GetPageSize()))
	if err != nil {
		return nil, err
	}
	encodings := make([][]byte, 0, len(page))
	size := 0
	for i, w := range page {
		encoding, err := s.encode(ctx, w)
		if err != nil {
			return nil, err
		}
		if size += len(encoding); i > 0 && size > maxPageBytes {
			page, more = page[:i], true
			break
		}
		encodings = append(encodings, encoding)
	}
	resp := &workspacev1.ListWorkspacesResponse{}
	setEncoded(resp, workspacesField, encodings...)
	if more {
		resp.NextPageToken = encodeToken(cursorOf(&page[len(page)-1].Workspace), list...)
	}
	return resp, nil
}

// visible is what a filter chooses of what its caller gets to see; nil: everything.
func visible(f *filter, view access.View) func(*store.Workspace) bool {
	switch {
	case view.All() && f == nil:
		return nil
	case view.All():
		return f.match
	}
	return func(w *store.Workspace) bool { return view.Shows(access.TargetOf(w)) && f.match(w) }
}

// listWorkspaces returns the n workspaces that match behind the cursor, and
// whether there are more.
func (s *Server) listWorkspaces(match func(*store.Workspace) bool, order ordering.OrderBy, after cursor, n int) (page []*store.Shared, more bool, err error) {
	if byName(order) {
		return s.store.ListShared(after.ID, n, match)
	}
	// One more than asked for, to know whether there is one.
	top := &topN{order: order, n: n + 1}
	_, _, err = s.store.ListWorkspaces("", 0, func(w *store.Workspace) bool {
		if (match == nil || match(w)) && (after.ID == "" || compareCursors(order, cursorOf(w), after) > 0) {
			top.offer(w)
		}
		return false
	})
	if err != nil {
		return nil, false, err
	}
	for _, w := range top.sorted() {
		page = append(page, &store.Shared{Workspace: w})
	}
	if len(page) > n {
		return page[:n], true, nil
	}
	return page, false, nil
}

// UpdateWorkspace implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND, ABORTED, FAILED_PRECONDITION, RESOURCE_EXHAUSTED,
// UNAVAILABLE.
func (s *Server) UpdateWorkspace(ctx context.Context, req *workspacev1.UpdateWorkspaceRequest) (*workspacev1.UpdateWorkspaceResponse, error) {
	id, err := parseWorkspaceName("workspace.name", req.GetWorkspace().GetName())
	if err != nil {
		return nil, err
	}
	if err := checkMask(req.GetUpdateMask()); err != nil {
		return nil, err
	}
	o, err := s.options(ctx, workspacev1.WorkspaceControl_UpdateWorkspace_FullMethodName, req, req.GetWorkspace().GetEtag())
	if err != nil {
		return nil, err
	}
	r, err := s.store.UpdateWorkspace(ctx, id, func(e *store.Editable) error {
		w := edited(e, req)
		if err := validateWorkspace(w); err != nil {
			return err
		}
		// A workspace leaves a scope only by who may do that where it goes, too.
		if o.Allow != nil {
			if err := o.Allow(&store.Workspace{ID: id, Labels: w.GetLabels()}); err != nil {
				return err
			}
		}
		// Nor does anybody get at it by giving it other labels.
		subject := &access.IdentityOf(ctx).Subject
		if err := subject.CheckGain(access.Target{ID: id, Labels: e.Labels}, access.Target{ID: id, Labels: w.GetLabels()}); err != nil {
			return err
		}
		spec := specFromProto(w.GetSpec())
		if err := s.admit(ctx, workspaceName(id), &e.Spec, &spec); err != nil {
			return err
		}
		e.Labels = cloneMap(w.GetLabels())
		e.Model = w.GetModel()
		e.Spec = spec
		return nil
	}, o)
	if err != nil {
		return nil, err
	}
	return &workspacev1.UpdateWorkspaceResponse{
		Workspace:  workspaceToProto(&r.Workspace),
		Generation: r.Workspace.Generation,
		Changed:    r.Changed,
	}, nil
}

// SetModel implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION, RESOURCE_EXHAUSTED,
// UNAVAILABLE.
func (s *Server) SetModel(ctx context.Context, req *workspacev1.SetModelRequest) (*workspacev1.SetModelResponse, error) {
	id, err := parseWorkspaceName("name", req.GetName())
	if err != nil {
		return nil, err
	}
	o, err := s.options(ctx, workspacev1.WorkspaceControl_SetModel_FullMethodName, req, "")
	if err != nil {
		return nil, err
	}
	r, err := s.store.UpdateWorkspace(ctx, id, func(e *store.Editable) error {
		e.Model = req.GetModel()
		return nil
	}, o)
	if err != nil {
		return nil, err
	}
	return &workspacev1.SetModelResponse{
		Workspace:  workspaceToProto(&r.Workspace),
		Generation: r.Workspace.Generation,
		Changed:    r.Changed,
	}, nil
}

// DeleteWorkspace implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND, ABORTED, RESOURCE_EXHAUSTED, UNAVAILABLE.
func (s *Server) DeleteWorkspace(ctx context.Context, req *workspacev1.DeleteWorkspaceRequest) (*workspacev1.DeleteWorkspaceResponse, error) {
	id, err := parseWorkspaceName("name", req.GetName())
	if err != nil {
		return nil, err
	}
	o, err := s.options(ctx, workspacev1.WorkspaceControl_DeleteWorkspace_FullMethodName, req, req.GetEtag())
	if err != nil {
		return nil, err
	}
	o.AllowMissing = req.GetAllowMissing()
	r, err := s.store.DeleteWorkspace(ctx, id, req.GetKeepVolumes(), o)
	if err != nil {
		return nil, err
	}
	if r.Workspace.ID == "" { // there was none
		return &workspacev1.DeleteWorkspaceResponse{}, nil
	}
	return &workspacev1.DeleteWorkspaceResponse{
		Workspace:  workspaceToProto(&r.Workspace),
		Generation: r.Workspace.Generation,
		Changed:    r.Changed,
	}, nil
}

// RestartWorkspace implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION, RESOURCE_EXHAUSTED,
// UNAVAILABLE.
func (s *Server) RestartWorkspace(ctx context.Context, req *workspacev1.RestartWorkspaceRequest) (*workspacev1.RestartWorkspaceResponse, error) {
	r, err := s.act(ctx, s.store.RestartWorkspace, workspacev1.WorkspaceControl_RestartWorkspace_FullMethodName, req)
	if err != nil {
		return nil, err
	}
	return &workspacev1.RestartWorkspaceResponse{
		Workspace:  workspaceToProto(&r.Workspace),
		Generation: r.Workspace.Generation,
		Changed:    r.Changed,
	}, nil
}

// StopWorkspace implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION, RESOURCE_EXHAUSTED,
// UNAVAILABLE.
func (s *Server) StopWorkspace(ctx context.Context, req *workspacev1.StopWorkspaceRequest) (*workspacev1.StopWorkspaceResponse, error) {
	r, err := s.act(ctx, s.store.StopWorkspace, workspacev1.WorkspaceControl_StopWorkspace_FullMethodName, req)
	if err != nil {
		return nil, err
	}
	return &workspacev1.StopWorkspaceResponse{
		Workspace:  workspaceToProto(&r.Workspace),
		Generation: r.Workspace.Generation,
		Changed:    r.Changed,
	}, nil
}

// StartWorkspace implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION, RESOURCE_EXHAUSTED,
// UNAVAILABLE.
func (s *Server) StartWorkspace(ctx context.Context, req *workspacev1.StartWorkspaceRequest) (*workspacev1.StartWorkspaceResponse, error) {
	r, err := s.act(ctx, s.store.StartWorkspace, workspacev1.WorkspaceControl_StartWorkspace_FullMethodName, req)
	if err != nil {
		return nil, err
	}
	return &workspacev1.StartWorkspaceResponse{
		Workspace:  workspaceToProto(&r.Workspace),
		Generation: r.Workspace.Generation,
		Changed:    r.Changed,
	}, nil
}

// namedChange is a change that needs a workspace's name and nothing more.
type namedChange interface {
	change
	GetName() string
}

func (s *Server) act(ctx context.Context, do func(context.Context, string, store.Options) (store.Result, error), method string, req namedChange) (store.Result, error) {
	id, err := parseWorkspaceName("name", req.GetName())
	if err != nil {
		return store.Result{}, err
	}
	o, err := s.options(ctx, method, req, "")
	if err != nil {
		return store.Result{}, err
	}
	return do(ctx, id, o)
}
