package server

import (
	"errors"
	"strings"

	"go.einride.tech/aip/filtering"
	expr "google.golang.org/genproto/googleapis/api/expr/v1alpha1"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

// filter is a parsed and type-checked filter over workspaces (AIP-160).
//
// Fields: name, model, state, parked, reconciling and labels. Operators: AND,
// OR (which binds tighter), NOT or -, parentheses, = and != (a string with a *
// at its start or end matches any beginning or end), and has:
//
//	labels:team         there is a label team
//	labels.team:"a"     it is "a"; labels.team:* is any value
//	name:"db"           the name contains db; also model
//
// A label that is not there equals nothing: `labels.team != "a"` matches a
// workspace without it. States are written RUNNING, WORKSPACE_STATE_RUNNING or
// as a string.
type filter struct{ root *expr.Expr }

const statePrefix = "WORKSPACE_STATE_"

var filterDeclarations = func() *filtering.Declarations {
	options := []filtering.DeclarationOption{
		filtering.DeclareIdent("name", filtering.TypeString),
		filtering.DeclareIdent("model", filtering.TypeString),
		filtering.DeclareIdent("state", typeState),
		filtering.DeclareIdent("parked", filtering.TypeBool),
		filtering.DeclareIdent("reconciling", filtering.TypeBool),
		filtering.DeclareIdent("labels", filtering.TypeMap(filtering.TypeString, filtering.TypeString)),
		filtering.DeclareIdent("true", filtering.TypeBool),
		filtering.DeclareIdent("false", filtering.TypeBool),
		filtering.DeclareFunction(filtering.FunctionAnd,
			filtering.NewFunctionOverload("and", filtering.TypeBool, filtering.TypeBool, filtering.TypeBool)),
		filtering.DeclareFunction(filtering.FunctionOr,
			filtering.NewFunctionOverload("or", filtering.TypeBool, filtering.TypeBool, filtering.TypeBool)),
		filtering.DeclareFunction(filtering.FunctionNot,
			filtering.NewFunctionOverload("not", filtering.TypeBool, filtering.TypeBool)),
		filtering.DeclareFunction(filtering.FunctionHas,
			filtering.NewFunctionOverload("has_string", filtering.TypeBool, filtering.TypeString, filtering.TypeString),
			filtering.NewFunctionOverload("has_map", filtering.TypeBool, filtering.TypeMap(filtering.TypeString, filtering.TypeString), filtering.TypeString)),
	}
	for _, f := range []string{filtering.FunctionEquals, filtering.FunctionNotEquals} {
		options = append(options, filtering.DeclareFunction(f,
			filtering.NewFunctionOverload(f+"_string", filtering.TypeBool, filtering.TypeString, filtering.TypeString),
			filtering.NewFunctionOverload(f+"_bool", filtering.TypeBool, filtering.TypeBool, filtering.TypeBool),
			filtering.NewFunctionOverload(f+"_state", filtering.TypeBool, typeState, typeState),
			filtering.NewFunctionOverload(f+"_state_string", filtering.TypeBool, typeState, filtering.TypeString)))
	}
	for name := range workspacev1.WorkspaceState_value {
		options = append(options,
			filtering.DeclareIdent(name, typeState),
			filtering.DeclareIdent(strings.TrimPrefix(name, statePrefix), typeState))
	}
	declarations, err := filtering.NewDeclarations(options...)
	if err != nil {
		panic(err) // a mistake in the list above
	}
	return declarations
}()

var typeState = filtering.TypeEnum(workspacev1.WorkspaceState(0).Type())

// parseFilter returns nil for the empty filter, which matches everything.
func parseFilter(s string) (*filter, error) {
	if strings.TrimSpace(s) == "" {
		return nil, nil
	}
	parsed, err := filtering.ParseFilterString(s, filterDeclarations)
	if err != nil {
		return nil, invalid("filter", "%s", explainFilter(err))
	}
	f := &filter{root: parsed.CheckedExpr.GetExpr()}
	if err := checkOperands(f.root); err != nil {
		return nil, err
	}
	return f, nil
}

const filterHelp = "; it is made of name, model, state, parked, reconciling and labels, like `state = RUNNING AND labels.team = \"a\"`"

// explainFilter makes one line of the parser's or checker's error.
func explainFilter(err error) string {
	type positioned interface {
		Position() filtering.Position
		Message() string
	}
	var inner positioned
	for e := err; e != nil; e = errors.Unwrap(e) {
		if p, ok := e.(positioned); ok {
			inner = p
		}
	}
	if inner != nil {
		return "must be a filter (AIP-160): " + inner.Position().String() + ": " + inner.Message() + filterHelp
	}
	reason := err.Error()
	if i := strings.LastIndex(reason, "expr: "); i >= 0 {
		reason = reason[i+len("expr: "):]
	}
	switch {
	case strings.Contains(reason, "'"+filtering.FunctionFuzzyAnd+"'"):
		reason = "terms are joined by AND or OR"
	case strings.HasPrefix(reason, "no matching overload"):
		reason = "an operator does not fit its operands"
	}
	return "must be a filter (AIP-160): " + reason + filterHelp
}

// checkOperands checks what the types leave open: one side of a comparison is a
// field, the other a value, and a state's name exists.
func checkOperands(e *expr.Expr) error {
	call := e.GetCallExpr()
	if call == nil {
		return nil
	}
	switch call.GetFunction() {
	case filtering.FunctionEquals, filtering.FunctionNotEquals, filtering.FunctionHas:
		left, right := call.GetArgs()[0], call.GetArgs()[1]
		if !isField(left) || isField(right) || right.GetCallExpr() != nil {
			return invalid("filter", "must compare a field, on the left, with a value%s", filterHelp)
		}
		if left.GetIdentExpr().GetName() == "state" {
			if _, ok := stateValue(right); !ok {
				return invalid("filter", "must compare state with one of %s", strings.Join(stateNames(), ", "))
			}
		}
		return nil
	}
	for _, arg := range call.GetArgs() {
		if err := checkOperands(arg); err != nil {
			return err
		}
	}
	return nil
}

func isField(e *expr.Expr) bool {
	if e.GetSelectExpr() != nil {
		return true
	}
	switch e.GetIdentExpr().GetName() {
	case "name", "model", "state", "parked", "reconciling", "labels":
		return true
	}
	return false
}

func stateNames() []string {
	var names []string
	values := workspacev1.WorkspaceState(0).Descriptor().Values()
	for i := 1; i < values.Len(); i++ {
		names = append(names, strings.TrimPrefix(string(values.Get(i).Name()), statePrefix))
	}
	return names
}

func stateValue(e *expr.Expr) (workspace.State, bool) {
	name := e.GetIdentExpr().GetName()
	if c := e.GetConstExpr(); c != nil {
		name = c.GetStringValue()
	}
	name = strings.TrimPrefix(name, statePrefix)
	n, ok := workspacev1.WorkspaceState_value[statePrefix+name]
	return workspace.State(name), ok && n != 0
}

// match reports whether the filter chooses the workspace.
func (f *filter) match(w *store.Workspace) bool {
	return f == nil || matchExpr(f.root, w)
}

func matchExpr(e *expr.Expr, w *store.Workspace) bool {
	call := e.GetCallExpr()
	if call == nil {
		return boolValue(e, w)
	}
	args := call.GetArgs()
	switch call.GetFunction() {
	case filtering.FunctionAnd:
		return matchExpr(args[0], w) && matchExpr(args[1], w)
	case filtering.FunctionOr:
		return matchExpr(args[0], w) || matchExpr(args[1], w)
	case filtering.FunctionNot:
		return !matchExpr(args[0], w)
	case filtering.FunctionEquals:
		return equal(args[0], args[1], w)
	case filtering.FunctionNotEquals:
		return !equal(args[0], args[1], w)
	case filtering.FunctionHas:
		return has(args[0], args[1].GetConstExpr().GetStringValue(), w)
	}
	return false
}

// boolValue is the value of a constant or field of type bool.
func boolValue(e *expr.Expr, w *store.Workspace) bool {
	switch e.GetIdentExpr().GetName() {
	case "true":
		return true
	case "parked":
		return w.Parked
	case "reconciling":
		_, reconciling := workspace.StateOf(w)
		return reconciling
	}
	return e.GetConstExpr().GetBoolValue()
}

func equal(field, value *expr.Expr, w *store.Workspace) bool {
	switch field.GetIdentExpr().GetName() {
	case "parked", "reconciling":
		return boolValue(field, w) == boolValue(value, w)
	case "state":
		have, _ := workspace.StateOf(w)
		want, _ := stateValue(value)
		return have == want
	}
	have, ok := stringValue(field, w)
	return ok && matchWildcard(have, value.GetConstExpr().GetStringValue())
}

// stringValue is the value of a field of type string, and whether it is there.
func stringValue(field *expr.Expr, w *store.Workspace) (string, bool) {
	switch field.GetIdentExpr().GetName() {
	case "name":
		return workspaceName(w.ID), true
	case "model":
		return w.Model, true
	}
	value, ok := w.Labels[labelKey(field)]
	return value, ok
}

// labelKey is the key in labels.key; one that is no plain word is quoted, as in
// labels."a.b".
func labelKey(field *expr.Expr) string {
	return field.GetSelectExpr().GetField()
}

func matchWildcard(s, pattern string) bool {
	prefix, anyEnd := strings.CutSuffix(pattern, "*")
	if suffix, anyStart := strings.CutPrefix(prefix, "*"); anyStart {
		if anyEnd {
			return strings.Contains(s, suffix)
		}
		return strings.HasSuffix(s, suffix)
	}
	if anyEnd {
		return strings.HasPrefix(s, prefix)
	}
	return s == pattern
}

func has(field *expr.Expr, want string, w *store.Workspace) bool {
	if field.GetIdentExpr().GetName() == "labels" {
		if want == "*" {
			return len(w.Labels) > 0
		}
		_, ok := w.Labels[want]
		return ok
	}
	have, ok := stringValue(field, w)
	switch {
	case !ok:
		return false
	case want == "*":
		return have != ""
	case field.GetSelectExpr() != nil:
		return have == want
	}
	return strings.Contains(have, want)
}
