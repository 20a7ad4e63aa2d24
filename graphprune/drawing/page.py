def to_html(graph):
    return ""
